"""Build the documentation site from the notebooks: `python tools/docs.py --out _build/html`.

`nbs/sidebar.yml` says which pages there are and in which section. Each notebook becomes a page: nbdev's directives are
obeyed, an exported cell becomes reference entries with its source folded away, a symbol in backticks becomes a checked
link. No notebook is run: the pages show the outputs that are stored. Exit status 1 on any warning.
"""
import argparse, os, re, shutil, subprocess, sys, tarfile
from functools import partial
from pathlib import Path

import yaml
from execnb.nbio import mk_cell, new_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import hide_line, rm_header_dash, strip_ansi
from reference import fence, names, reference
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", "kd_arbitrary"


def page(path: str) -> str: return re.sub(r"(^|/)\d+[a-z]?_", r"\1", path.removesuffix(".ipynb"))
def toctree(pages: list[str]) -> str: return fence("{toctree}", ":hidden:\n\n" + "\n".join(pages))


def notebooks() -> dict[str, str | None]:
    "Notebook -> the module it exports, if any."
    paths = sorted(Path(path) for path in nbglob())
    found = {path: re.search(r"#\|\s*default_exp ([\w.]+)", path.read_text()) for path in paths}
    return {path.relative_to(NBS).as_posix(): f"{LIB}.{match[1]}" if match else None for path, match in found.items()}


def sections(there: set[str]) -> dict[str, list[str]]:
    "Section -> notebooks, from the sidebar; a notebook that is not listed, or listed and missing, ends the build."
    contents = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    table = {item["section"]: item.get("contents") or [] for item in contents if isinstance(item, dict)}
    listed = {path for paths in table.values() for path in paths} | {"index.ipynb"}
    wrong = [f"nbs/{path} is not in nbs/sidebar.yml; add it under a section" for path in sorted(there - listed)]
    wrong += [f"nbs/sidebar.yml lists {path}, but there is no nbs/{path}" for path in sorted(listed - there)]
    if wrong: sys.exit("\n".join(wrong))
    return table


def pages(text: str) -> str:
    "Markdown whose links to notebooks lead to their pages."
    return re.sub(r"\]\(((?!\w+:)[^)#\s]+)\.ipynb", lambda m: f"]({page(m[1])}.ipynb", text)


def linked(text: str, symbols: dict[str, str]) -> str:
    "Markdown with symbols in backticks as links, notebook links as page links, and Quarto's callouts as admonitions."
    def link(match):
        name = match[1].removesuffix("()")
        return f"{{py:obj}}`{match[1]} <{symbols[name]}>`" if name in symbols else match[0]
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)     # code fences stay as they are
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<![`\[{}\w])`([\w.]+(?:\(\))?)`(?![`\]])", link, parts[i])
        parts[i] = pages(parts[i])
        parts[i] = re.sub(r"^(:::+) *\{\.callout-(\w+)[^}\n]*\}", r"\1{\2}", parts[i], flags=re.M)
    return "".join(parts)


def write_page(path: str, module: str | None, folder: Path, symbols: dict, extra: str = "") -> tuple[str, str]:
    "Write the page of a notebook, with `extra` Markdown at its end; its title and description."
    processors, link = [FrontmatterProc, strip_ansi, hide_line, rm_header_dash], partial(linked, symbols=symbols)
    notebook = NBProcessor(NBS / path, procs=processors, process=True).nb
    title, lead = notebook.frontmatter_["title"], link(str(notebook.frontmatter_.get("description", "")))
    top = [f"# {title}\n", fence("{div} lead", lead)] + [fence(f"{{py:module}} {module}", "")] * bool(module)
    cells = [mk_cell("\n".join(top), "markdown")]
    for cell in notebook.cells:
        flags = cell.get("directives_") or {}
        if cell.cell_type == "raw" or flags.keys() & {"hide", "default_exp", "exporti"}: continue
        if flags.get("include:") == ["false"]: continue
        if cell.cell_type == "markdown": cells.append(mk_cell(link(cell.source), "markdown"))
        elif flags.keys() & {"export", "exports"}:
            cells.append(mk_cell(reference(cell.source, module, link), "markdown"))
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            hidden = [("echo:", "remove-input"), ("output:", "remove-output")]
            cell.metadata = {"tags": [tag for key, tag in hidden if flags.get(key) == ["false"]]}
            for shown in (output.get("data", {}) for output in cell.get("outputs", ())):
                if "text/markdown" in shown: shown["text/markdown"] = pages("".join(shown["text/markdown"]))
            cells.append(cell)
    out = folder / f"{page(path)}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_nb(new_nb(cells + [mk_cell(extra, "markdown")], {"kernelspec": dict(notebook.metadata["kernelspec"])}), out)
    return title, lead


def write_section(name: str, told: dict[str, tuple[str, str]], folder: Path) -> str:
    "Write the page of a section, with a card for each of its pages; the page's name."
    cards = [fence(f"{{grid-item-card}} {title}", f":link: {page(path)}\n:link-type: doc\n\n{lead}", 4)
             for path, (title, lead) in told.items()]
    grid = fence("{grid} 1 1 2 2", ":gutter: 3\n\n" + "".join(cards), 5)
    (folder / f"{name.lower()}.md").write_text(f"# {name}\n\n{grid}\n{toctree([page(path) for path in told])}")
    return name.lower()


def fetch_mathjax(static: Path, cache: Path) -> None:
    "Put MathJax beside the site, from npm; without it formulas are shown as TeX."
    cache.mkdir(parents=True, exist_ok=True)
    archive, script = cache / "mathjax-3.2.2.tgz", static / "mathjax" / "tex-svg.js"
    if not archive.exists() and shutil.which("npm"):
        subprocess.run(["npm", "pack", "--silent", "mathjax@3.2.2"], cwd=cache, capture_output=True)
    script.parent.mkdir(parents=True)
    if archive.exists():
        with tarfile.open(archive) as tar: script.write_bytes(tar.extractfile("package/es5/tex-svg.js").read())
    else:
        script.write_text("")
        print("npm could not fetch mathjax@3.2.2: the site is built without it and shows formulas as TeX")


OURS = ".kd_arbitrary-site"  # a file in a folder that may be emptied


def refuse_foreign(out: Path) -> None:
    "Stop before a folder is emptied that no site was built in."
    if ROOT.is_relative_to(out.resolve()): raise SystemExit(f"{out} holds this project; name a folder for the site alone")
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in (OURS, ".buildinfo")):
        raise SystemExit(f"{out} would be emptied, and no site was built there; name another --out")


def build(out: Path) -> int:
    "Write the pages and run Sphinx over them; 1 if there was any warning."
    config, modules, source, symbols = get_config(path=ROOT), notebooks(), out.parent / f"{out.name}-source", {}
    table = sections(set(modules))
    refuse_foreign(out)
    for folder in (source, out, out.parent / "jupyter_execute"): shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    (out / OURS).touch()
    for module in filter(None, modules.values()): symbols = names(module, ROOT) | symbols
    fetch_mathjax(source / "_static", out.parent / "cache")
    shutil.copy(NBS / "styles.css", source / "_static")
    made = []
    for name, paths in table.items():
        told = {path: write_page(path, modules[path], source, symbols) for path in paths}
        if told: made.append(write_section(name, told, source))
    write_page("index.ipynb", None, source, symbols, toctree(made))
    settings = dict(
        project=config.title, author=config.author, copyright=config.copyright, release=config.version,
        extensions=["myst_nb", "sphinx_design", "sphinx_copybutton"], nb_execution_mode="off", nb_render_markdown_format="myst", nb_merge_streams=True,
        myst_enable_extensions=["dollarmath", "amsmath", "colon_fence", "deflist", "fieldlist", "alert"],
        myst_heading_anchors=4, mathjax_path="mathjax/tex-svg.js", add_module_names=False,
        python_maximum_signature_line_length=88, python_use_unqualified_type_names=True,
        html_theme="pydata_sphinx_theme", html_title=config.title, html_static_path=["_static"],
        html_css_files=["styles.css"], html_sidebars={"index": []}, html_copy_source=False, html_show_sphinx=False,
        html_theme_options=dict(
            navigation_with_keys=False, navbar_align="left", navbar_end=["theme-switcher"], show_toc_level=2,
            header_links_before_dropdown=8,
            secondary_sidebar_items=["page-toc"], footer_start=["copyright"], footer_end=[], back_to_top_button=False))
    app = Sphinx(source, None, out, out.parent / "doctrees", "html", confoverrides=settings, status=None,
                 freshenv=True, warningiserror=True)
    app.build()
    told = "there were warnings" if app.statuscode else "no warnings"
    print(f"{told}; {len(list(out.rglob('*.html')))} pages: {os.path.relpath(out / 'index.html')}")
    return app.statuscode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_build/html", help="the site; working files go beside it")
    out = parser.parse_args().out.resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.exit(build(out))
