"""One run at a time in a folder."""

from pathlib import Path

from filelock import FileLock, Timeout

from fastpref.errors import UserError


class RunLock:
    """The lock of a run's folder. The system takes it from a process that dies, so a killed run blocks nobody."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, FileLock(folder / ".lock")

    def acquire(self) -> None:
        """Take it, if it is not held already; makes the folder. Raises UserError while another run has it."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self._folder}: another run is writing to this folder; wait for its end, or choose another output.dir"
            ) from None
        except (OSError, NotImplementedError):
            pass  # no right to write, which is said where a run begins; or a file system without locks

    def release(self) -> None:
        self._lock.release(force=True)
