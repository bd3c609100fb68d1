"""Files that come from elsewhere, with one thing or many wrong: what is generated, and what may come of it."""

import copy
import os
import warnings

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from latentsmith.files.errors import BadInput

EXAMPLES = int(os.environ.get("LATENTSMITH_EXAMPLES", "30"))
settings.register_profile(
    "foreign",
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a failure prints its file as it is: shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)

DEEP: list = []
for _ in range(50):
    DEEP = [DEEP]
ODD = [
    None, True, False, -1, 0, 1, 3, 65, 2**31, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "1", "\ud800", "a\nb", "../../x", "/dev/zero", [], [[]], {}, {"a": 1}, [1, "a"], [0], [-1], [2**40, 2**40],
    [0, 2**62], ["x"] * 3, DEEP, [None], {"": None},
]  # fmt: skip


def spots(value, path=()):
    """Every path into a JSON value, its own first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from spots(item, (*path, key))


def changed(value, path, new):
    if not path:
        return copy.deepcopy(new)
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


@st.composite
def mutated(draw, valid):
    """A JSON value with one to three of its parts replaced, taken out or added to."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(spots(value))))
        value = changed(value, path, draw(st.sampled_from(ODD)))
        if isinstance(value, dict) and draw(st.integers(0, 4)) == 0:
            value[draw(st.sampled_from([*map(str, value), "new", "", "__metadata__"]))] = draw(st.sampled_from(ODD))
    return value


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def attempt():
    """Run a function: it may return, or raise BadInput with one line."""

    def run(function, *arguments):
        try:
            return function(*arguments)
        except BadInput as error:
            message = str(error)
            assert "\n" not in message and len(message) < 800, message
            return None

    return run
