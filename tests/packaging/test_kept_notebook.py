"""The tour as it is kept: whole, executed from top to bottom, and readable on a code host."""

import json

import source

TOUR = source.TREE / "examples" / "tour.ipynb"


def test_outputs_are_kept():
    """Each cell was executed, in order and without an error; table and pictures are there, and no home folder is."""
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    kept = json.dumps(outputs)

    assert [*range(1, len(cells) + 1)] == [cell["execution_count"] for cell in cells]
    assert {"stream", "display_data", "execute_result"} >= {output["output_type"] for output in outputs}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert 2 == sum("image/png" in output.get("data", ()) for output in outputs)
    assert "<table>" in kept
    assert not any(path in kept for path in ("/home/", "/root/", "/Users/", "/work/"))
    assert TOUR.stat().st_size < 300_000
