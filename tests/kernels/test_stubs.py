"""The declarations that the type checker reads are those of the compiled modules."""

import ast
import re
from pathlib import Path

import pytest

import bft_kernels


def signature(function):
    """Names of arguments in order, which have names only, and the values of those that need not be
    given.
    """
    a = function.args
    positional = [x.arg for x in (*a.posonlyargs, *a.args) if x.arg not in ("self", "arg0")]
    named = [x.arg for x in a.kwonlyargs]
    first = len(positional) - len(a.defaults)
    defaults = dict(zip(positional[first:], a.defaults, strict=True))
    defaults |= {x: d for x, d in zip(named, a.kw_defaults, strict=True) if d is not None}
    return positional, named, {x: ast.literal_eval(d) for x, d in defaults.items()}


def of_docstring(function):
    """What pybind11 says of a function in the first line of its docstring."""
    line = function.__doc__.splitlines()[0]
    return signature(ast.parse(f"def {line}: ...").body[0])


def declared(name):
    """Functions, and classes' functions, by name, and the names of numbers."""
    functions, numbers = {}, set()
    for node in ast.parse(Path(bft_kernels.__file__).with_name(f"{name}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = signature(node)
        elif isinstance(node, ast.AnnAssign):
            numbers.add(node.target.id)
        elif isinstance(node, ast.ClassDef):
            own = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            functions |= {f"{node.name}.{x.name}": signature(x) for x in own}
    return functions, numbers


def compiled(module):
    """The same of a module."""
    functions, numbers = {}, set()
    for name, value in vars(module).items():
        if isinstance(value, type):
            own = {x: f for x, f in vars(value).items() if x == "__init__" or x[0] != "_"}
            functions |= {f"{name}.{x}": of_docstring(f) for x, f in own.items()}
        elif callable(value):
            functions[name] = of_docstring(value)
        elif isinstance(value, int | float):
            numbers.add(name)
    return functions, numbers


# Where a function of the bindings begins, and an argument that is taken by a name in quotes.
BEGINS = re.compile(
    r'(?:def|launches|launches_of<(?P<of>\w+)>|takes)\(\s*(?:module, )?"(?P<made>\w+)"'
    r"|(?P<helper>\w+)\(Given&? given|void (?P<other>\w+)\("
)
TAKEN = re.compile(r'(?:given\.\w+(?:<[^()]*>)?\(\s*|\w+\(given, |flag\()"(\w+)"')


def takers(source):
    """What each function of the bindings takes by name: by itself, and with its helpers."""
    begins = list(BEGINS.finditer(source))
    ends = [*(begin.start() for begin in begins[1:]), len(source)]
    own, calls = {}, {}
    for begin, end in zip(begins, ends, strict=True):
        name, text = begin["made"] or begin["helper"] or begin["other"], source[begin.end() : end]
        own[name] = {*TAKEN.findall(text)} | ({"stream"} if "given.launch(" in text else set())
        own[name] |= {"Problem": {"problem"}, "LogitRows": {"rows"}}.get(begin["of"], set())
        calls[name] = set(re.findall(r"(\w+)\(given\b", text))

    def taken(name):
        return own[name].union(*(taken(helper) for helper in calls[name] & own.keys()))

    return {name: (own[name], taken(name)) for name in own}


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_names_and_arguments_are_those_of_the_module(name, request):
    if name == "_cuda":
        functions, numbers = compiled(request.getfixturevalue("emulated"))
        functions = {x: f for x, f in functions.items() if not x.startswith("memory.")}
    else:
        functions, numbers = compiled(pytest.importorskip(f"bft_kernels.{name}"))
    wanted, declared_numbers = declared(name)
    assert (wanted.keys(), declared_numbers) == (functions.keys(), numbers)
    # What takes its arguments one by one, by name, does not list them; it refuses others. A helper
    # may take some more that its caller has no use for.
    taking = takers((Path(__file__).parents[2] / f"csrc/bindings/{name[1:]}.cpp").read_text())
    for function, (positional, named, defaults) in wanted.items():
        if functions[function] == ([], [], {}) and named:
            assert not positional
            own, taken = taking[function.removesuffix(".__init__")]
            assert own <= {*named} <= taken, function
        else:
            assert functions[function] == (positional, named, defaults), function
