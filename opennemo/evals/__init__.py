"""How good a model is, by the field's own measures, over any checkpoint or server.

    suites -> tables (lm-evaluation-harness over harness.py)       -> rows -> report, compare
              judging, functions, long_context, coding, perplexity

A run is a folder (runs.py) in which every answer stands the moment it is there; a row is a number
with the items it was made of (rows.py), so that all suites are reported and compared alike.
"""
