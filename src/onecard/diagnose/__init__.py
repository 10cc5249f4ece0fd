"""What is wrong, and how fast things are: on this machine, by trying."""
