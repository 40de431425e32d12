"""The lock that keeps a second run out of a folder."""

from pathlib import Path

from filelock import FileLock, Timeout

from fastpref.errors import UserError


class RunLock:
    """The lock of a run's folder. The system releases it when its process dies, so a killed run blocks nobody."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, FileLock(folder / ".lock")

    @property
    def held(self) -> bool:
        """Whether a process has the lock now. Nothing is written."""
        if self._lock.is_locked or not (self._folder / ".lock").exists():
            return self._lock.is_locked
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            return False
        self._lock.release()
        return False

    def acquire(self) -> None:
        """Take the lock unless it is held already, and create the folder. Raises UserError if another run has it."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0.2)  # who asks whether it is held takes it for a moment
        except Timeout:
            raise UserError(
                f"{self._folder}: another run is writing to this folder; wait for its end, or choose another output.dir"
            ) from None
        except (OSError, NotImplementedError):
            pass  # no permission to write, which the start of the run reports, or no locks in this file system

    def release(self) -> None:
        self._lock.release(force=True)
