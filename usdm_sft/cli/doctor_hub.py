"""Check of the Hugging Face Hub: offline mode, reachability, login. Every request ends after ten seconds at most."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # a re-export

from usdm_sft.cli.doctor_findings import Finding, Needs
from usdm_sft.template.config import USTM
from usdm_sft.utils.texts import first_line

TIMEOUT = 5.0  # seconds


def check_hub(needs: Needs) -> Iterator[Finding]:
    """Find out whether files can be fetched, and whether the user is logged in. No request is sent in offline mode."""
    if constants.HF_HUB_OFFLINE:
        yield Finding("ok", "Hub", "offline mode is on (HF_HUB_OFFLINE), so that nothing is fetched")
        return
    try:
        HfApi().model_info(USTM, timeout=TIMEOUT)
    except HfHubHTTPError:
        pass  # an answer of the server; the check of the tokenizer asks for the repository that is used
    except (OSError, HTTPError) as error:
        reason = first_line(error)
        text = f"{constants.ENDPOINT} cannot be reached ({reason}): check the network and the proxy"
        yield Finding("warning", "Hub", f"{text}, or set HF_HUB_OFFLINE=1 if all files are here")
        return
    needs.online = True
    yield from _check_login()


def _check_login() -> Iterator[Finding]:
    token = get_token()
    if token is None:
        text = "reachable; nobody is logged in ('hf auth login' is needed for push and for private repositories)"
        yield Finding("ok", "Hub", text)
        return
    try:
        name = HfApi().whoami(token)["name"]
    except (OSError, HTTPError) as error:
        reason = first_line(error).replace(token, "(token)")
        text = f"reachable, but it does not accept the token ({reason}): run 'hf auth login', or correct HF_TOKEN"
        yield Finding("warning", "Hub", text)
    else:
        yield Finding("ok", "Hub", f"reachable; {name} is logged in")
