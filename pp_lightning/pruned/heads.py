"""What else fixes the number of heads of an attention module: fields and parameters to change while it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class ConfigView:
    """A module's config with some fields of its own; everything else is read from, and written to, the config.

    Some attention modules read their number of heads from the config that all modules of the model share.
    """

    def __init__(self, config: Any, own: Sequence[str]) -> None:
        self.__dict__["_config"] = config
        self.__dict__["_own"] = {name: getattr(config, name) for name in own}

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_own", {})
        if name in own:
            return own[name]
        if "_config" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__["_own"]:
            self.__dict__["_own"][name] = value
        else:
            setattr(self.__dict__["_config"], name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class HeadFields:
    """The fields of one attention module.

    Args:
        module: the attention module.
        query_counts: attributes with its number of query heads; ``config.NAME`` is a field of its config.
        key_counts: the same of key/value heads.
        parameters: paths of parameters that a unit has rows in, one unit after the other.
        queries: query heads of one unit.
        keys: key/value heads of one unit, as its projections give them.
        number: U, units.
        repeats: query heads that share a key/value head in the stock module, where each has its own here; 1 elsewhere.
    """

    def __init__(
        self,
        module: nn.Module,
        query_counts: Sequence[str] = (),
        key_counts: Sequence[str] = (),
        parameters: Sequence[str] = (),
        *,
        queries: int = 1,
        keys: int = 1,
        number: int = 0,
        repeats: int = 1,
    ) -> None:
        self._module = (module,)
        self._counts = {**dict.fromkeys(query_counts, queries), **dict.fromkeys(key_counts, keys)}
        self._parameters = tuple(parameters)
        self._queries = queries
        self._number = number
        self._repeats = repeats
        self._before: dict[str, Any] = {}
        self._whole: dict[str, nn.Parameter] = {}

    def install(self) -> None:
        """Give the module a config of its own where that is needed, and every query head its own key/value head."""
        module: Any = self._module[0]
        shared = [name.removeprefix("config.") for name in self._counts if name.startswith("config.")]
        if shared:
            self._before["config"] = module.config
            module.config = ConfigView(module.config, shared)
        if self._repeats > 1 and hasattr(module, "num_key_value_groups"):
            self._before["num_key_value_groups"] = module.num_key_value_groups
            module.num_key_value_groups = 1
        for name in self._counts:
            owner, attribute = self._owner(name)
            self._before.setdefault(name, getattr(owner, attribute))
        self.widen()

    def remove(self) -> None:
        """Undo :meth:`install`."""
        for name in self._counts:
            owner, attribute = self._owner(name)
            setattr(owner, attribute, self._before.pop(name))
        for name, value in self._before.items():
            setattr(self._module[0], name, value)
        self._before = {}

    def narrow(self, kept: Tensor | None) -> None:
        """Set the counts for the kept units (K,), and slice the parameters; None is all units."""
        if kept is None:
            return
        self._set_counts(kept.shape[0])
        for name in self._parameters:
            owner, attribute = self._owner(name)
            self._whole[name] = whole = owner._parameters[attribute]
            owner._parameters[attribute] = self._of_units(whole, kept)

    def widen(self) -> None:
        """Undo :meth:`narrow`."""
        self._set_counts(self._number)
        for name, whole in self._whole.items():
            owner, attribute = self._owner(name)
            owner._parameters[attribute] = whole
        self._whole = {}

    def narrow_for_good(self, kept: Tensor) -> dict[str, nn.Parameter]:
        """Set the counts and slice the parameters until :meth:`remove`; returns the whole parameters by path."""
        self._set_counts(kept.shape[0])
        whole: dict[str, nn.Parameter] = {name: getattr(*self._owner(name)) for name in self._parameters}
        own = {name: self._of_units(parameter.detach(), kept) for name, parameter in whole.items()}
        self.put({name: nn.Parameter(own[name], parameter.requires_grad) for name, parameter in whole.items()})
        return whole

    def put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the module these parameters, by path."""
        for name, parameter in parameters.items():
            setattr(*self._owner(name), parameter)

    def _of_units(self, whole: Tensor, kept: Tensor) -> Tensor:
        return whole.unflatten(0, (self._number, -1)).index_select(0, kept).flatten(0, 1)

    def _set_counts(self, units: int) -> None:
        for name, in_one in self._counts.items():
            owner, attribute = self._owner(name)
            setattr(owner, attribute, units * in_one)

    def _owner(self, name: str) -> tuple[Any, str]:
        """What has the attribute of this path: the module, its config, or a module in it."""
        path, _, attribute = name.rpartition(".")
        return getattr(self._module[0], path) if path else self._module[0], attribute
