"""`python -m hf_awq_offload` does the same as the console script `hf-awq-offload`."""

import sys

from .cli.main import main

sys.exit(main())
