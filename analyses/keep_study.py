"""Keep the verdict, tables and figures of a finished study where they can be read without running it.

    python -m analyses.keep_study runs/methods runs/relearning [--out figures]

Writes OUT/study_NAME.md, .csv (every number), .png (every method, by place) and, where there are few enough points to
name them, _tradeoff.png (what is kept against what the first attack brought back). Needs kaleido and a Chromium.
"""

import argparse
from pathlib import Path

from locedit.report import study_figures, study_table
from locedit.storage import write_text
from locedit.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of studies")
    parser.add_argument("--out", default="figures", type=Path)
    args = parser.parse_args()
    for run in args.runs:
        keep(Study.load(run), args.out)


def keep(study: Study, out: Path) -> None:
    """Write the files of one study."""
    stem = out / f"study_{study.name}"
    write_text(stem.with_suffix(".md"), study.markdown())
    write_text(stem.with_suffix(".csv"), study.csv())
    study.plot().write_image(stem.with_suffix(".png"), width=1400, scale=1.5)
    for attack in study_table.attacks_of(study)[:1]:
        made = study_figures.tradeoff(study, attack)
        if all("text" in trace.mode for trace in made.data):
            made.write_image(out / f"{stem.name}_tradeoff.png", width=1000, scale=1.5)
    print(f"{stem}.md")


if __name__ == "__main__":
    main()
