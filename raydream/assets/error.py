"""Why an asset cannot be used."""


class AssetError(Exception):
    """An asset that cannot be used; ``reason`` is a stable word for reports, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["AssetError"], tuple[str, str]]:
        return AssetError, (self.reason, self.detail)  # must survive the way from a worker to the driver
