"""The figures of a report, a file for each concept: functions that draw one from plain records with matplotlib.

Figures take their width in inches, so that a narrow page gets a figure drawn for it and not a shrunken one. What an
artist stands for is said with `eval.drawing.tell`, and the page shows it on hover.
"""
