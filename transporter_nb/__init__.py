"""See what a video model means by a word

The names below are imported when they are first used, so that `import transporter_nb` is quick.
"""
from importlib import import_module

__version__ = "0.1.0"

HOMES = { # name -> module
    "ConceptBank": "concepts.bank",
    "ContrastPair": "world.contrasts",
    "CouplingNetwork": "coupling.network",
    "Explanation": "explain.explanation",
    "Explorer": "app.widgets",
    "Models": "models.view",
    "Transporter": "explain.transporter",
    "load_generator": "models.registry",
    "load_video": "world.video",
    "load_vlm": "models.registry",
    "parse_contrast": "world.contrasts",
    "plan": "explain.plan",
    "projected_transport": "coupling.transport",
    "register_vlm": "models.registry",
}
__all__ = ["__version__", *HOMES]


def __getattr__(name):
    if name not in HOMES: raise AttributeError(
        f"module 'transporter_nb' has no attribute {name!r}. It offers {', '.join(HOMES)}.")
    value = globals()[name] = getattr(import_module(f"transporter_nb.{HOMES[name]}"), name)
    return value


def __dir__(): return sorted({*globals(), *HOMES})
