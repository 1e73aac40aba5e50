"""The command line.

    main.py       from a command line to an exit code        parser.py, recipe_*.py   commands and options
    preflight.py  what file names alone tell                 outcome.py               exit codes

These import neither torch nor transformers: `--help` and mistakes are answered at once. What a command does is in the
file of its name, imported when it is known: `run(options)` of a parsed command line returns an `Outcome`.
"""
