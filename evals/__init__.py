"""Judging: benchmark suites, evaluation runs, paired comparisons and reports."""
