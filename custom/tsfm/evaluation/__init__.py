"""Evaluation: label maps beside the truth become scores, tables and pages.

Label maps and labels enter; Dice, surface Dice, lesion counts and pictures leave. Nothing else may depend on it.
"""
