"""The order in which streamed layers are copied into a few slots of device memory, used and overwritten.

Layer k always lies in slot k mod S, in the forward pass and in the backward pass. So a tensor of a slot that a layer's
backward pass keeps from its forward pass has the layer's numbers again once the layer has arrived a second time.
"""

from typing import Literal, Protocol

Direction = Literal[1, -1]  # forwards or backwards through the layers


class Transfers(Protocol):
    """Copies from host memory to slots, on a queue of their own beside the device's queue of computations."""

    def copy(self, layer: int, slot: int) -> None:
        """Queue the copy of a layer into a slot, after all computations that `release` has noted for the slot."""

    def wait(self, slot: int) -> None:
        """Let the computations that are queued from now on wait for the last copy into a slot."""

    def release(self, slot: int) -> None:
        """Note that the computations that are queued already are the last that read what a slot holds."""


class Schedule:
    """Keeps the layers in slots: the current one, and the next ones in the direction of travel.

    An `arrive` may name any layer, so that every order of layers computes the right numbers. The layers that come next
    are copied while the current one computes.
    """

    def __init__(self, layers: int, slots: int, transfers: Transfers):
        if slots < 2:
            raise ValueError(f"{slots} slot: a layer can only be copied during the computation of another with two")
        self.layers, self.slots, self.transfers = layers, slots, transfers
        self.held: list[int | None] = [None] * slots  # the layer that each slot has, or is being copied
        self.current: int | None = None

    def slot(self, layer: int) -> int:
        """Return the slot in which a layer lies whenever it computes."""
        return layer % self.slots

    def arrive(self, layer: int, direction: Direction) -> None:
        """Make a layer the current one: computations from now on may read it, and no longer the one before."""
        if layer == self.current:
            return
        if self.current is not None:
            self.transfers.release(self.slot(self.current))
        self._fetch(layer)
        self.transfers.wait(self.slot(layer))
        self.current = layer
        for ahead in range(1, self.slots):
            coming = layer + direction * ahead
            if 0 <= coming < self.layers:
                self._fetch(coming)

    def _fetch(self, layer: int) -> None:
        slot = self.slot(layer)
        if self.held[slot] != layer:
            self.transfers.copy(layer, slot)
            self.held[slot] = layer
