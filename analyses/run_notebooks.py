"""Execute every notebook of this folder in order and keep its figures under figures/. Exit status 1 when one fails."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def main() -> int:
    """Run the notebooks in the repository root, so that their paths are those of the README."""
    failed = 0
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(HERE.parent)}}).execute()
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name}: failed\n{error}", file=sys.stderr)
        else:
            print(f"{path.name}: ran {sum(c.cell_type == 'code' for c in notebook.cells)} cells")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
