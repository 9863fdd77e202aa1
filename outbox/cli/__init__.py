"""The command line: parse, call one function, print, exit with 0 (done), 1 (failed) or 2 (usage).

Knows typer, rich and what fits a terminal. Must not decide anything, and must not speak SQL.
"""
