"""Reference entries, in MyST Markdown, of what an exported cell defines. Used by docs.py.

Signature and types come from the source; what a parameter means from the comment on its line (nbdev's docments).
"""
import ast, copy, textwrap
from importlib import import_module
from pathlib import Path
from typing import Callable

from fastcore.docments import docments


def fence(kind: str, body: str, marks: int = 3) -> str: return f"{':' * marks}{kind}\n{body}\n{':' * marks}\n"
def decorators(node) -> str: return " ".join(ast.unparse(d) for d in node.decorator_list)


def public(nodes) -> list:
    "The functions and classes that are meant for callers."
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]


def methods(node) -> list:
    "The methods of a class that have a docstring."
    return [m for m in public(node.body) if ast.get_docstring(m)] if isinstance(node, ast.ClassDef) else []


def tables(nodes) -> list[str]:
    "The public constants."
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    return [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper() and t.id[0] != "_"]


def names(module: str, folder: Path) -> dict[str, str]:
    "How prose may call what a module defines -> its full name."
    tree = ast.parse((folder / (module.replace(".", "/") + ".py")).read_text()).body
    own = [node.name for node in public(tree)] + tables(tree)
    own += [f"{node.name}.{m.name}" for node in public(tree) for m in methods(node)]
    table = {name: f"{module}.{name}" for name in own}
    return table | {f"{module.split('.')[-1]}.{name}": full for name, full in table.items()} | {module: module}


def default(value) -> str:
    "The default of a dataclass field as a caller sees it; empty where there is none."
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "field": return ast.unparse(value) if value else ""
    told = {word.arg: ast.unparse(word.value) for word in value.keywords}
    return told.get("default") or (told["default_factory"] + "()" if "default_factory" in told else "")


def parameters(node, bound: bool) -> tuple[str, list[tuple]]:
    "The signature without types, and (name, type) of each parameter."
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if init: return parameters(init, True)
        if "dataclass" not in decorators(node): return "", []
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        text = [f.target.id + (f"={default(f.value)}" if default(f.value) else "") for f in fields]
        return f"({', '.join(text)})", [(f.target.id, ast.unparse(f.annotation)) for f in fields]
    args = copy.deepcopy(node.args)
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    every = [arg for arg in every if arg]
    if bound: every.remove(args.args.pop(0))
    typed = [(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "") for arg in every]
    for arg in every: arg.annotation = None
    return f"({ast.unparse(args)})", typed


def entry(node, thing, module: str, link: Callable, owner: str = "") -> str:
    "The entry of a function or class, with the methods of the class inside."
    is_class, is_property = isinstance(node, ast.ClassDef), "property" in decorators(node)
    thing = getattr(thing, "func", None) or getattr(thing, "fget", None) or thing     # cached_property, property
    said = {name: link(" ".join(text.split())) for name, text in docments(thing, args_kwargs=True).items() if text}
    signature, typed = parameters(node, bool(owner) and "staticmethod" not in decorators(node))
    returns = ast.unparse(node.returns) if not is_class and node.returns else ""
    body = [f":module: {module}"]
    if is_property: signature, typed, body = "", [], body + [f":type: {returns}"] * bool(returns)
    if "classmethod" in decorators(node): body.append(":classmethod:")
    body += ["", link(textwrap.dedent(ast.get_docstring(node) or "")), ""]
    for name, kind in typed:
        body += [f":param {name}: {said.get(name, '')}"] + [f":type {name}: {kind}"] * bool(kind)
    if is_property: body.append(said.get("return", ""))
    elif not is_class:
        gives = [f"*{returns}*"] * (returns not in ("", "None")) + [said.get("return", "")] * ("return" in said)
        body += [f":returns: {' – '.join(gives)}"] * bool(gives)
    for method in methods(node): body += ["", entry(method, vars(thing)[method.name], module, link, node.name)]
    kind = "class" if is_class else "property" if is_property else "method" if owner else "function"
    name = f"{owner}.{node.name}" if owner else node.name
    return fence(f"{{py:{kind}}} {name}{signature}", "\n".join(body), 4 if owner else 5)


def reference(source: str, module: str, link: Callable) -> str:
    "What an exported cell becomes: the entries of its public definitions, and its source, folded."
    tree = ast.parse(source).body
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree): return ""
    entries = [entry(node, getattr(import_module(module), node.name), module, link) for node in public(tree)]
    entries += [fence(f"{{py:data}} {name}", f":module: {module}") for name in tables(tree)]
    return "\n".join(entries + [fence("{dropdown} Source", f"```python\n{source.strip()}\n```", 4)])
