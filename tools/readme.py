"""Write README.md from nbs/index.ipynb, as Quarto's GitHub Markdown would be, without Quarto.

    python tools/readme.py            # write README.md and its figures, in index_files/
    python tools/readme.py --check    # change nothing; exit status 1 if they are not current
"""
import argparse, base64, re, sys
from pathlib import Path

from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import hide_line, rm_header_dash, rm_export, strip_ansi

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "index_files"


def prose(text: str) -> str:
    "Markdown with links that hold at the top of the repository, and callouts as GitHub writes them."
    text = re.sub(r"(\]\()(?!\w+:|/|#)([^)\s]+)", r"\1nbs/\2", text).replace("](nbs/../", "](")
    def alert(match):
        lines = [f"[!{match[1].upper()}]", "", *match[2].strip().splitlines()]
        return "\n".join(f"> {line}".rstrip() for line in lines)
    return re.sub(r"^:::+ *\{\.callout-(\w+)[^}\n]*\}\n(.*?)^:::+$", alert, text, flags=re.M | re.S)


def shown(output: dict, name: str, figures: dict[str, bytes]) -> str:
    "An output as Markdown; a picture is added to `figures`."
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    for kind, suffix in [("image/svg+xml", "svg"), ("image/png", "png")]:
        if kind not in data: continue
        path = f"{FIGURES}/{name}.{suffix}"
        figures[path] = data[kind].encode() if suffix == "svg" else base64.b64decode(data[kind])
        return f"![]({path})"
    if "text/markdown" in data: return prose(data["text/markdown"].strip())
    if "text/html" in data: return re.sub(r"<style.*?</style>\n*", "", data["text/html"], flags=re.S).strip()
    text = data.get("text/plain") or "".join(output.get("text", []))
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().splitlines())


def readme() -> tuple[str, dict[str, bytes]]:
    "The text, and the figures by path."
    processors = [FrontmatterProc, strip_ansi, hide_line, rm_header_dash, rm_export]
    notebook = NBProcessor(ROOT / "nbs/index.ipynb", procs=processors, process=True).nb
    front, figures = notebook.frontmatter_, {}
    parts = [f"# {front['title']}", "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->"]
    if "description" in front: parts.append(f"> {front['description']}")
    for cell in notebook.cells:
        flags = cell.get("directives_") or {}
        if cell.cell_type == "markdown": parts.append(prose(cell.source))
        if cell.cell_type != "code" or flags.get("include:") == ["false"]: continue
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if source and flags.get("echo:") != ["false"]: parts.append(f"``` python\n{source}\n```")
        if flags.get("output:") != ["false"]:
            parts += [shown(output, f"{cell.id}-{i}", figures) for i, output in enumerate(cell.outputs, 1)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if not current")
    check = parser.parse_args().check
    text, files = readme()
    files["README.md"] = text.encode()
    there = [path for path in [ROOT / "README.md", *ROOT.glob(f"{FIGURES}/*")] if path.exists()]
    there = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in there}
    if check: sys.exit("README.md is not current: run python tools/readme.py" if there != files else 0)
    for name in there.keys() - files.keys(): (ROOT / name).unlink()
    for name, content in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(content)


if __name__ == "__main__": main()
