"""Every python snippet of README.md and of the pages runs, in the order of its page.

A snippet is a fence tagged ``python``; one that begins with ``>>>`` runs as a doctest.
Other tags (``pycon``, ``text``, ``bash``) are only shown.
"""

import doctest
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A longer fence closes only with its like, so a fence shown inside it is no snippet.
FENCE = re.compile(
    r"^[ ]*(?P<fence>`{3,})(?P<tag>[^`\n]*)\n(?P<code>.*?)^[ ]*(?P=fence)`*[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    code: str
    line: int  # lines above it on the page, so that a traceback shows the page's own


def snippets(page: str) -> list[Snippet]:
    return [
        Snippet(
            textwrap.dedent(match["code"]), page.count("\n", 0, match.start("code"))
        )
        for match in FENCE.finditer(page)
        if match["tag"].strip() == "python"
    ]


def run_snippet(snippet: Snippet, namespace: dict, path: Path) -> None:
    if snippet.code.lstrip().startswith(">>>"):
        test = doctest.DocTest(
            doctest.DocTestParser().get_examples(snippet.code),
            namespace,
            path.name,
            str(path),
            snippet.line,
            snippet.code,
        )
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        runner = doctest.DocTestRunner(optionflags=flags)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        namespace.update(test.globs)  # DocTest works on a copy
        assert runner.failures == 0, "".join(report)
    else:
        source = "\n" * snippet.line + snippet.code
        exec(compile(source, str(path), "exec"), namespace)


def run_page(path: Path) -> None:
    namespace = {"__name__": "__main__"}
    try:
        for snippet in snippets(path.read_text(encoding="utf-8")):
            run_snippet(snippet, namespace, path)
    finally:
        plt.close("all")


@pytest.mark.parametrize(
    "path",
    [page for page in PAGES if snippets(page.read_text(encoding="utf-8"))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_snippets_of_the_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path)


PAGE = """
```python
total = 1
```

- In a list:

  ```python
  >>> total += 1
  >>> total
  2
  ```

```bash
exit 1
```

````markdown
```python
raise AssertionError("shown, not run")
```
````

```python
assert total == 2
open("written", "w").close()
```
"""


def test_a_page_is_one_session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    run_page(page)
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("code", ["assert 1 == 2\n", ">>> 1 + 1\n3\n"])
def test_a_wrong_snippet_fails(tmp_path, code):
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{code}```\n")
    with pytest.raises(AssertionError):
        run_page(page)
