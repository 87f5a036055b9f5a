"""`python -m trainer reproduce`: the tables and figures of the MetaPT paper, cell by cell.

config      the command's flags
plan        which runs a table or a figure is made of
sources     source texts, how they are grouped, and their fingerprints
work        one run: a start (MetaPT, PPT), or a method on a task with a seed
store       a JSON file a run, by the hash of its configuration
pool        runs in parallel processes
statistics  means, deviations, paired tests
paper       what the paper printed
report      tables as Markdown and CSV
plots       PNG and SVG
command     all of it together
"""
