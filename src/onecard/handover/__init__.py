"""A trained model in other hands: talked to, served."""
