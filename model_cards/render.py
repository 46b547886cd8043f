# SPDX-License-Identifier: Apache-2.0
"""
Renders the model cards of this folder from the records (`run.json`) beside them.

    python model_cards/render.py           writes every README.md
    python model_cards/render.py --check   says which of them differ from their record, with exit code 1
"""

import argparse
from pathlib import Path

from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.record import RECORD_FILE, RunRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card is not that of its record")
    args = parser.parse_args()
    stale = []
    for file in sorted(Path(__file__).parent.glob(f"*/{RECORD_FILE}")):
        card, path = render_card(RunRecord.load(file.parent)), file.with_name("README.md")
        if args.check:
            stale += [path.parent.name] if not path.is_file() or path.read_text(encoding="utf-8") != str(card) else []
        else:
            card.save(path)
    if stale:
        raise SystemExit(f"error: not as rendered: {', '.join(stale)}. Run `python model_cards/render.py`.")


if __name__ == "__main__":
    main()
