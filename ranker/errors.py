from __future__ import annotations


class RankerError(Exception):
    """Training or evaluation cannot continue; the message names the problem and the fix.

    RankerError
    ├── DatasetError               a dataset cannot be read, or has too little data to learn from
    ├── ObtainError                the example data could not be obtained
    │   ├── DownloadError          the download from the package index failed
    │   └── UntrustedDownloadError the downloaded file is not the expected one
    ├── SettingError               an option is invalid, unknown, or contradicts another
    ├── CheckpointError            a checkpoint cannot be read, or belongs to another run
    ├── DivergedError              the loss is no longer finite
    ├── GateError                  the new model is worse than its parent or its baselines by more than the gates allow
    ├── PropensityError            logged requests cannot tell what another policy would have earned
    ├── TrackingError              a metrics tracker cannot be reached, or rejects the metrics
    └── ParityError                an engine does not compute the same as the trained network
    """


class DatasetError(RankerError): ...


class ObtainError(RankerError): ...


class DownloadError(ObtainError): ...


class UntrustedDownloadError(ObtainError): ...


class SettingError(RankerError): ...


class CheckpointError(RankerError): ...


class DivergedError(RankerError): ...


class GateError(RankerError): ...


class PropensityError(RankerError): ...


class TrackingError(RankerError): ...


class ParityError(RankerError): ...
