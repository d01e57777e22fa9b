"""The models in memory, with the run costs, near caches and recorded sequences that each needs."""

from __future__ import annotations

from server.request.features import FeatureReader
from server.request.recording import Recording
from server.request.routing import ServedModel
from server.scheduling.engine_streams import Runner


class InstalledModels:
    """Keeps run costs, near caches and recorded sequences for the models in memory. Belongs to one event loop."""

    def __init__(self, runner: Runner, features: FeatureReader, recording: Recording | None) -> None:
        """Store the parts; nothing happens yet.

        Args:
            runner: runs the models' networks and learns their costs.
            features: holds the near caches that the models read.
            recording: records actions into the sequences that the models read; None when actions are not recorded.
        """
        self._runner = runner
        self._features = features
        self._recording = recording
        self._by_digest: dict[str, ServedModel] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def install(self, served: ServedModel) -> None:
        """Prepare for a model's first request."""
        self._runner.learn(served.model)
        self._by_digest[served.model.digest] = served
        self._record_actions()

    def dismiss(self, served: ServedModel) -> None:
        """Drop what is kept for a model that no request holds any more."""
        self._runner.forget(served.model)
        del self._by_digest[served.model.digest]
        self._record_actions()
        self.drop_unread_caches()

    def drop_unread_caches(self) -> None:
        """Drop the near caches that no installed model reads, such as those of a version that failed."""
        self._features.keep_caches([served.model.needs for served in self._by_digest.values()])

    def in_flight(self, served: ServedModel) -> int:
        """Return how many requests and engine runs use a model."""
        return served.in_flight + self._runner.runs(served.model)

    def _record_actions(self) -> None:
        if self._recording is not None:
            manifests = [served.model.manifest for served in self._by_digest.values()]
            self._recording.write_into([one.sequence for one in manifests if one.sequence is not None])
