"""The command line.

    main.py       the entry point                            signals.py               Ctrl-C and SIGTERM
    command.py    runs a command line                        parser.py, recipe_*.py   commands and options
    preflight.py  checks that need only file names           outcome.py               results, errors and exit codes

These import neither torch nor transformers, so that `--help` and mistakes are answered at once. Each command lives in
the file of its name, which is imported once the command is known; its `run(options)` returns an `Outcome`.
"""
