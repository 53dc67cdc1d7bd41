"""Texts on their way to a model: cleaning, vocabularies, files of conversations. A wing."""
