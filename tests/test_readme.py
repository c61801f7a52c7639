"""What the README shows is what the command wrote."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["learns/claims", "learns/table", "learns/beside", "learns_ar/claims", "learns_ar/beside", "bench/table"]
)
def test_tables_are_the_files_that_the_benchmarks_wrote(name):
    mark = name.removeprefix("learns/").replace("/", " ")
    shown = re.search(rf"<!-- {mark} -->\n+(.*?)\n+<!-- end -->", README, re.DOTALL)
    assert shown and shown[1] == (ROOT / "docs" / f"{name}.md").read_text().strip()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and all((ROOT / target).exists() for target in targets if "://" not in target)
