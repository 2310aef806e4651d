"""Every metric's card, one file a family: its definition, range, chance level, known failure and source."""
