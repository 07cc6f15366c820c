"""The names under which one bundle is served: with C2C, and the receiver alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from runtime.server.errors import ApiError, invalid_request


@dataclass(frozen=True)
class ServedModels:
    """The names of one bundle."""

    with_c2c: str
    receiver: str
    num_sharers: int

    @property
    def names(self) -> tuple[str, ...]:
        """All of them; a bundle without sharers has but one."""
        return (self.with_c2c, self.receiver) if self.num_sharers else (self.with_c2c,)

    def check(self, name: str) -> None:
        """Raise a 404 for a name that is none of them."""
        if name not in self.names:
            known = " and ".join(self.names)
            message = f"there is no model {name!r} here; this server has {known}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    def sharers_for(self, name: str, fuse: bool | None, sharers: Sequence[int] | None) -> tuple[int, ...]:
        """The numbers of the sharers that a request uses; none of them is the receiver alone.

        Raises an `ApiError` for an unknown model or sharer, and for what the receiver alone cannot do.
        """
        self.check(name)
        for number in sharers or ():
            if number not in range(self.num_sharers):
                has = f"sharers 0 to {self.num_sharers - 1}" if self.num_sharers else "no sharers"
                raise invalid_request(f"sharers: there is no sharer {number}; this bundle has {has}", "sharers")
        alone = name != self.with_c2c
        if alone and (fuse or sharers):
            field = "fuse" if fuse else "sharers"
            raise invalid_request(f"{field}: the model {name} uses no sharers; ask {self.with_c2c} for C2C", field)
        if alone or fuse is False:
            return ()
        return tuple(range(self.num_sharers)) if sharers is None else tuple(sorted(set(sharers)))
