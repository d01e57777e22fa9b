from __future__ import annotations


class RankerError(Exception):
    """Training or evaluation cannot go on; the message names what is wrong and what would fix it.

    RankerError
    ├── DatasetError               a dataset cannot be read, or holds too little to learn from
    ├── ObtainError                example data could not be made available
    │   ├── DownloadError          the package index could not be asked, or gave nothing
    │   └── UntrustedDownloadError what was downloaded is not what this code was written for
    ├── SettingError               options that contradict each other, or name what there is not
    ├── CheckpointError            a checkpoint cannot be read, or belongs to another run
    ├── DivergedError              the loss is no number any more
    ├── GateError                  what was trained is worse than its parent by more than may be
    ├── TrackingError              a tracker of metrics cannot be reached, or refuses them
    └── ParityError                an engine computes something else than what was trained
    """


class DatasetError(RankerError): ...


class ObtainError(RankerError): ...


class DownloadError(ObtainError): ...


class UntrustedDownloadError(ObtainError): ...


class SettingError(RankerError): ...


class CheckpointError(RankerError): ...


class DivergedError(RankerError): ...


class GateError(RankerError): ...


class TrackingError(RankerError): ...


class ParityError(RankerError): ...
