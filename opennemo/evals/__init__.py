"""How good a model is, by established measures, for any checkpoint or server.

    suites -> tables (lm-evaluation-harness over harness.py)       -> rows -> report, compare
              judging, functions, long_context, coding, perplexity

A run is a folder (runs.py) to which every answer is written at once; a row is a number with the
items that it was computed from (rows.py), so that all suites are reported and compared alike.
"""
