"""Ids in, hidden states out: models, attention, dropout, the head with its loss, generation."""
