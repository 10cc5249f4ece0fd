"""The processes of one run: who is here, what they tell one another, and how they are started."""
