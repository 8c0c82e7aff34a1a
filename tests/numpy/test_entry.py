# SPDX-License-Identifier: MIT
"""Public functions: tracebacks end at the user's line, and metadata look like plain functions'."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import traceback
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of
from fusedadam import Adam, adam_step, global_norm
from fusedadam._core import public

Function = TypeVar("Function", bound=Callable[..., Any])


def ours(function: Function) -> Function:
    """The same function as if it were defined in a module of the package."""
    namespace = globals() | {"__name__": "fusedadam.made_for_a_test"}
    made: Any = types.FunctionType(function.__code__, namespace)
    return cast("Function", made)


@ours
def refuse(error: BaseException) -> None:
    raise error


@ours
def refuse_in_a_handler() -> None:
    try:
        refuse(KeyError("found nothing"))
    except KeyError:
        refuse(ValueError("refused"))


@public
@ours
def refuse_in_a_handler_of_that() -> None:
    try:
        refuse_in_a_handler()
    except ValueError:
        refuse(TypeError("refused"))


@public
@ours
def refuse_because() -> None:
    try:
        int("x")
    except ValueError as cause:
        raise TypeError("refused") from cause


@ours
def call_it(function: Callable[[], object]) -> object:
    return function()


public_refuse, public_call = public(refuse), public(call_it)


def error_of(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # of any kind
        call()
    return caught.value


def functions(error: BaseException) -> list[str]:
    """The names of a traceback's functions, without this file's own call."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)][2:]


# -- refused arguments ------------------------------------------------------------------------


ARRAYS: dict[str, Any] = {name: np.ones(2) for name in ("params", "grads", "m", "v")}
REFUSED: dict[str, Callable[[], object]] = {
    "Adam()": lambda: Adam(beta_1=2.0),
    "both names of lr": lambda: Adam(lr=0.5, learning_rate=0.5),
    "an unknown keyword": lambda: Adam(beta1=0.5),  # type: ignore[arg-type]
    "from_config": lambda: Adam.from_config({"lr": "nowhere:nothing"}),
    "an attribute": lambda: setattr(Adam(), "epsilon", "fast"),
    "lr": lambda: setattr(Adam(), "lr", -1.0),
    "learning_rate": lambda: setattr(Adam(), "learning_rate", True),
    "current_lr": lambda: Adam(lr=lambda _: -1.0).current_lr,
    "adam_step": lambda: adam_step(**ARRAYS, step=0),
    "adam_step's settings": lambda: adam_step(**ARRAYS, step=1, lr=True),
    "global_norm": lambda: global_norm([np.ones(2), "array"]),
    "set_num_threads": lambda: fusedadam.set_num_threads(0),
    "set_isa": lambda: fusedadam.set_isa("none"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_traceback_of_what_is_refused_ends_at_the_callers_line(call: Callable[[], object]) -> None:
    error = error_of(call)
    assert isinstance(error, (TypeError, ValueError))
    assert functions(error) == []
    shown = "".join(traceback.format_exception(error))
    # If a schedule cannot be imported, the cause is inside the import, so it is shown.
    assert "site-packages/fusedadam" not in shown or error.__cause__ is not None


SHORTENED: list[type[BaseException]] = [TypeError, ValueError, OverflowError, UnicodeError]
WHOLE = [RuntimeError, OSError, KeyError, MemoryError, AssertionError, KeyboardInterrupt]


@pytest.mark.parametrize("error", [*SHORTENED, *WHOLE])
def test_only_refusals_lose_where_they_were_raised(error: type[BaseException]) -> None:
    raised = error("refused")
    assert error_of(lambda: public_refuse(raised)) is raised
    assert functions(raised) == ([] if error in SHORTENED else ["refuse"])
    assert raised.__context__ is None


def test_errors_handled_on_the_way_are_forgotten_but_the_users_own() -> None:
    assert error_of(refuse_in_a_handler_of_that).__context__ is None
    own = LookupError("of the user")

    def refused_in_a_handler() -> None:
        try:
            raise own
        except LookupError:
            refuse_in_a_handler_of_that()

    assert error_of(refused_in_a_handler).__context__ is own
    assert own.__traceback__ is not None


def test_a_stated_cause_stays() -> None:
    error = error_of(refuse_because)
    assert functions(error) == []
    assert isinstance(error.__cause__, ValueError)
    assert functions(error.__cause__) or error.__cause__.__traceback__ is not None


def users_own() -> float:
    raise ValueError("from the user's own function")


FAILING: dict[str, Callable[[], object]] = {
    "called": lambda: public_call(users_own),
    "called by another": lambda: public_call(lambda: public_call(users_own)),
    "schedule": lambda: Adam(lr=lambda _: users_own()).current_lr,
    # A wrong call that the user makes inside a callback is the user's error as well.
    "wrong in itself": lambda: public_call(lambda: Adam(beta_1=2.0)),
}


@pytest.mark.parametrize("call", FAILING.values(), ids=FAILING)
def test_error_of_a_users_function_keeps_all(call: Callable[[], object]) -> None:
    names = functions(error_of(call))
    assert names[0] in ("call_it", "current_lr")
    assert names[-1] in ("users_own", "<lambda>")


@pytest.mark.parametrize(("value", "shown"), [("", []), ("full", ["__init__"])])
def test_whole_traceback_on_demand(value: str, shown: list[str]) -> None:
    code = """
        import traceback, fusedadam
        try:
            fusedadam.Adam(beta_1=2.0)
        except ValueError as e:
            print([f.name for f in traceback.extract_tb(e.__traceback__)])
    """
    printed = output_of(code, environment={"FUSEDADAM_TRACEBACK": value})
    assert printed == str(["<module>", *shown])


# -- metadata of functions --------------------------------------------------------------------


def test_what_is_called_is_passed_on() -> None:
    @public
    def function(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    assert function() == ((), {})
    assert function(1, 2, a=3) == ((1, 2), {"a": 3})
    assert function(*[1], a=2) == ((1,), {"a": 2})

    class Owner:
        method = function
        of_class = classmethod(function)
        value = property(public(lambda self: self))

    owner = Owner()
    assert owner.method(1) == ((owner, 1), {})
    assert owner.method.__self__ is owner  # type: ignore[attr-defined]
    assert Owner.method(1) == ((1,), {})
    assert Owner.of_class(1) == ((Owner, 1), {})
    assert owner.value is owner
    assert Owner.method is Owner.__dict__["method"]
    with pytest.raises(TypeError):
        public(1)  # type: ignore[type-var]


def test_it_has_what_tools_read_of_a_function() -> None:
    wrapped = cast("Any", adam_step)
    assert wrapped.__name__ == wrapped.__qualname__ == "adam_step"
    assert wrapped.__module__ == "fusedadam.adam"
    assert wrapped.__doc__.startswith("Take one step of `Adam` in place")
    assert inspect.isroutine(adam_step)
    assert callable(adam_step)
    assert repr(wrapped).startswith("<function adam_step at ")
    assert "def adam_step(" in inspect.getsource(wrapped)
    assert inspect.signature(wrapped) == inspect.signature(wrapped.__wrapped__)
    wrapped.note = 1
    assert wrapped.note == wrapped.__dict__.pop("note")
    with pytest.raises(TypeError, match="cannot create"):
        type(wrapped)(len)


@pytest.mark.parametrize("function", [adam_step, global_norm])
def test_it_is_copied_and_pickled_by_its_name(function: Callable[..., Any]) -> None:
    assert copy.deepcopy(function) is function
    assert copy.copy(function) is function
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(function, protocol)) is function


def test_it_is_freed_with_what_refers_to_it() -> None:
    class Owner:
        @public
        def method(self) -> None: ...

    method: Any = Owner.__dict__["method"]
    method.owner = Owner
    gone = weakref.ref(method)
    del Owner, method
    gc.collect()
    assert gone() is None
