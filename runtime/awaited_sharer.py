"""A sharer that is computed elsewhere: here are only the caches for its rows, which the fuser reads."""

from collections.abc import Mapping
from typing import NoReturn

from c2c_export.errors import C2CError
from engines.base import Binding, Device, Engine, View
from runtime.fuser import Fuser


class AwaitedSharer(Engine):
    """Has a cache for each that its fuser reads, and nothing to run."""

    def __init__(self, number: int, fuser: Fuser, device: Device) -> None:
        """`number` is the sharer's; `device` is where its caches are."""
        self._number = number
        self.device = device
        self.inputs = tuple(spec.model_copy(update={"name": f"past_{spec.name}"}) for spec in fuser.sharer_caches)
        self.outputs = ()
        self.address_alignment = fuser.address_alignment

    def bind(self, views: Mapping[str, View]) -> Binding:
        """Raises `C2CError`: there is nothing to run."""
        self._refuse()

    def run(self, binding: Binding) -> None:
        """As `bind`."""
        self._refuse()

    def _bind(self, views: Mapping[str, View]) -> Binding:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise C2CError(
            f"sharer {self._number} is not loaded (load_sharers=False); say in the request who reads, as read_sharers"
        )
