"""Environment variables that keep the libraries we use from reporting home, and from talking on stdout."""

import os
import secrets

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # its notices of dead workers may go to a file
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to --json
    "NO_ALBUMENTATIONS_UPDATE": "1",  # img2dataset's picture library looks for a newer release at import
    "WANDB_MODE": "disabled",  # imported, never used, by img2dataset
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "true",  # the common switch, for whatever comes in later
}


def quiet_environment() -> dict[str, str]:
    """Set the switches for this process and its children; call it before any of these libraries is imported.

    Returns:
        The switches, for the environment of workers on other machines.
    """
    os.environ.update(QUIET)
    return dict(QUIET)


def private_ray() -> None:
    """Guard the Ray that this process is going to start by a secret of its own, which its workers inherit.

    Ray looks at these variables when it is imported. Without them it would keep a token file in the home
    directory.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
