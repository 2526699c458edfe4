"""Figures from rankings: measures of other codebases, intervals, significance, groups of queries."""
