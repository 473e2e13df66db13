"""Checks of the set-up before a run: the machine, the Hub, the models, the corpus and the disk."""
