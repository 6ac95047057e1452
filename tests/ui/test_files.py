"""The dashboard's files as they lie there: types, libraries, and what the policy of its pages forbids."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fairlead.api.ui.files import FOLDER, IMPORTS, Files

TYPESCRIPT = "7.0.2"
OURS = sorted(path for path in FOLDER.rglob("*.js") if "vendor" not in path.parts)


def tsc(folder: Path) -> str:
    """The compiler: the machine's own, or one that npm brings. Skips where there is neither."""
    if found := shutil.which("tsc"):
        return found
    if shutil.which("npm") is None:
        pytest.skip("neither tsc nor npm is on this machine: nobody checks the types of the dashboard's scripts")
    kept = Path.home() / ".cache" / "fairlead-tests" / f"typescript-{TYPESCRIPT}"
    binary = kept / "node_modules" / ".bin" / "tsc"
    if not binary.exists():
        command = ["npm", "install", "--silent", "--no-save", "--prefix", str(kept), f"typescript@{TYPESCRIPT}"]
        if subprocess.run(command, capture_output=True, timeout=300, cwd=folder).returncode:
            pytest.skip("npm cannot bring TypeScript: nobody checks the types of the dashboard's scripts")
    return str(binary)


def test_the_scripts_types_hold(tmp_path: Path) -> None:
    checked = subprocess.run([tsc(tmp_path), "-p", str(FOLDER)], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_script_writes_no_html_and_asks_no_other_host(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// @ts-check")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|dangerously", text)
    assert not re.search(r'style="', text), 'the policy forbids style="...": use an object'
    assert not re.search(r"[\"'`](https?:)?//[a-z]", text)
    for static, dynamic in re.findall(r'^(?:import|export)\b[^"]*?\bfrom "([^"]+)"|\bimport\("([^"]+)"\)', text, re.MULTILINE):
        imported = static or dynamic
        assert imported in IMPORTS or (path.parent / imported).is_file()


def test_libraries_are_what_they_are_said_to_be() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (FOLDER / "vendor" / "VENDOR.md").read_text().splitlines()
        if "|" in line
    ][2:]
    assert {row[0] for row in rows} == {
        str(path.relative_to(FOLDER / "vendor"))
        for path in (FOLDER / "vendor").rglob("*")
        if path.suffix in {".js", ".css", ".woff2", ".ts"}
    }
    for name, _, _, _, digest in rows:
        assert hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() == digest, name
    assert {path.stem for path in (FOLDER / "vendor" / "licences").iterdir()} == {
        "htm",
        "inter",
        "preact",
        "signals",
        "signals-core",
        "uplot",
    }


def test_every_import_of_the_map_is_there_and_types_are_not_served() -> None:
    files = Files()
    assert set(IMPORTS.values()) <= set(files.by_name)
    assert not [name for name in files.by_name if "types" in name or name.endswith((".md", ".json", ".ts", ".txt"))]
