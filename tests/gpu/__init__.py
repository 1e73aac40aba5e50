"""All that a real GPU has to say, in one command of nine minutes (docs/gpu.md).

    make gpu                                      with the project's environment
    make gpu PYTHON=python3                       with the interpreter that is there; nothing is installed
    python -m tests.gpu --only linears,decoding   some parts
    python -m tests.gpu --small --simulated       toy shapes on the simulated GPU: shows that the command works

| file | job |
|---|---|
| `__main__.py` | options; what is left when all parts have run: the summary, the table, the exit code |
| parts.py | the parts, in order, with their time limits and the packages that they need |
| processes.py | runs each part in a process of its own, within its limit |
| part_process.py | that process: gets ready, waits for its turn, runs |
| recorder.py | what a part reports: figures, failures, what was not run |
| results.py | the file of results, which is only ever appended to |
| figures.py | the rows of the table, here and in docs/gpu.md |
| device.py, made_models.py | timing and memory of the device; models of any shape with random weights |
| card_tests.py | which tests of the suite a card is needed for |
| environment.py … adapters.py | one file for each part |
"""
