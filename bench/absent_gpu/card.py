"""The GPUs that are pretended to be there, from NVIDIA's data sheets and the CUDA programming guide."""

from dataclasses import dataclass
from types import SimpleNamespace

_KIB = 1024


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that torch and Triton read."""

    architecture: int  # ten times its compute capability
    name: str
    processors: int
    shared: int  # KiB of a processor's shared memory
    block: int  # KiB of it that one block may have
    threads: int  # of a processor

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    @property
    def limit(self) -> int:
        """The bytes of shared memory that one block may have."""
        return self.block * _KIB

    def properties(self) -> SimpleNamespace:
        """Return what `torch.cuda.get_device_properties` would."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name, major=major, minor=minor, multi_processor_count=self.processors, total_memory=24 << 30,
            max_threads_per_multi_processor=self.threads, max_threads_per_block=1024, regs_per_multiprocessor=65536,
            warp_size=32, shared_memory_per_block=48 * _KIB, shared_memory_per_block_optin=self.limit,
            shared_memory_per_multiprocessor=self.shared * _KIB, L2_cache_size=40 << 20, clock_rate=1_500_000,
            memory_clock_rate=1_000_000, memory_bus_width=384, is_integrated=0, gcnArchName="", uuid="0",
        )  # fmt: skip


CARDS = {
    card.architecture: card
    for card in (
        Card(75, "T4", 40, 64, 64, 1024),
        Card(80, "A100", 108, 164, 163, 2048),
        Card(86, "RTX 3090", 82, 100, 99, 1536),
        Card(89, "RTX 4090", 128, 100, 99, 1536),
        Card(90, "H100", 132, 228, 227, 2048),
        Card(120, "RTX 5090", 170, 100, 99, 1536),
    )
}
