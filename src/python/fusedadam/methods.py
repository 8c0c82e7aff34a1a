# SPDX-License-Identifier: MIT
"""A descriptor for methods of a class and of its instances."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    class_or_instance_method = classmethod
else:

    class class_or_instance_method:
        """A method whose first argument is the instance, or the class if called on the class."""

        def __init__(self, function: Callable[..., Any]) -> None:
            self.__wrapped__ = function
            self.__doc__ = function.__doc__

        def __get__(self, instance: object, owner: type) -> MethodType:
            return MethodType(self.__wrapped__, owner if instance is None else instance)
