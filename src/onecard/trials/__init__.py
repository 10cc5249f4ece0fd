"""Short trainings that answer a question: how fast this machine is, and which learning rate to take."""
