# ruff: noqa: E501 - a row of the tables is a line
"""The forms of secrets that are known by what they look like, each with its reason and its source.

gitleaks: https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml (rules by id).
detect-secrets: https://github.com/Yelp/detect-secrets/tree/master/detect_secrets/plugins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST_TOKEN = 20  # characters: an AWS access key id; every pattern below needs as many

_NO_MORE = r"(?![A-Za-z0-9])"


@dataclass(frozen=True, slots=True)
class TokenPattern:
    """A kind of token that begins with letters of its own.

    Attributes:
        name: Whose it is.
        prefixes: What such a token begins with; looked for first, since it is cheap.
        form: The whole token, from where a prefix was found. Each repetition is of one set of characters.
        reason: The reason why it is on the list.
        source: Where its form is described.
    """

    name: str
    prefixes: tuple[str, ...]
    form: re.Pattern[bytes]
    reason: str
    source: str


def _token(name: str, prefixes: str, form: str, reason: str, source: str) -> TokenPattern:
    return TokenPattern(name, tuple(prefixes.split()), re.compile(form.encode()), reason, source)


_LM = "Pays for calls of a language model; DSPy programs handle it."
_CLOUD = "Gives access to a cloud account."
_CODE = "Gives access to source code, packages or builds."
_CHAT = "Lets anybody read or write as the application."
_PAY = "Moves money."

TOKENS: Sequence[TokenPattern] = (
    _token("OpenAI", "sk-proj- sk-svcacct- sk-admin- sk-None-", r"sk-(?:proj|svcacct|admin|None)-[\w\-]{20,}", _LM, "gitleaks openai-api-key"),
    _token("OpenAI and those that copy its form", "sk-", r"sk-(?:[A-Za-z0-9]{20,}|(?=[\w\-]{0,40}?[0-9])[A-Za-z0-9]{32,}[\w\-]*)", _LM, "gitleaks openai-api-key; https://platform.deepseek.com/api_keys"),
    _token("Anthropic", "sk-ant-", r"sk-ant-[\w\-]{20,}", _LM, "gitleaks anthropic-api-key"),
    _token("OpenRouter", "sk-or-v1-", r"sk-or-v1-[0-9a-f]{20,}", _LM, "https://openrouter.ai/docs/api-reference/authentication"),
    _token("Langfuse", "sk-lf-", r"sk-lf-[0-9a-f\-]{20,}", "Reads and writes traces.", "https://langfuse.com/docs/api-and-data-platform/features/public-api"),
    _token("Hugging Face", "hf_ api_org_", r"(?:hf_|api_org_)[A-Za-z0-9]{30,}", _LM, "gitleaks huggingface-access-token"),
    _token("Groq", "gsk_", r"gsk_[A-Za-z0-9]{40,}", _LM, "https://console.groq.com/docs/quickstart"),
    _token("Perplexity", "pplx-", r"pplx-[A-Za-z0-9]{40,}", _LM, "gitleaks perplexity-api-key"),
    _token("xAI", "xai-", r"xai-[A-Za-z0-9]{40,}", _LM, "https://docs.x.ai/docs/tutorial"),
    _token("NVIDIA", "nvapi-", r"nvapi-[\w\-]{40,}", _LM, "https://docs.api.nvidia.com/nim/reference/llm-apis"),
    _token("Replicate", "r8_", r"r8_[A-Za-z0-9]{30,}", _LM, "https://replicate.com/docs/topics/security/api-tokens"),
    _token("Tavily", "tvly-", r"tvly-[A-Za-z0-9\-]{20,}", "Pays for a search tool of agents.", "https://docs.tavily.com/documentation/api-reference/introduction"),
    _token("Pinecone", "pcsk_", r"pcsk_[\w]{40,}", "Reads and writes a retriever's index.", "https://docs.pinecone.io/guides/projects/manage-api-keys"),
    _token("LangSmith", "lsv2_pt_ lsv2_sk_", r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}", "Reads and writes traces.", "https://docs.smith.langchain.com/administration/how_to_guides/organization_management/create_account_api_key"),
    _token("Databricks", "dapi dose dkea", r"(?:dapi|dose|dkea)[0-9a-f]{32}(?:-\d)?" + _NO_MORE, "Reads and writes an MLflow server and its models.", "gitleaks databricks-api-token"),
    _token("AWS", "AKIA ASIA ABIA ACCA", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}" + _NO_MORE, _CLOUD, "gitleaks aws-access-token; https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html"),
    _token("Google", "AIza", r"AIza[\w\-]{35}(?![\w\-])", _CLOUD, "gitleaks gcp-api-key"),
    _token("Google OAuth", "ya29. GOCSPX-", r"(?:ya29\.[\w\-]{20,}|GOCSPX-[\w\-]{28})", _CLOUD, "https://developers.google.com/identity/protocols/oauth2"),
    _token("DigitalOcean", "dop_v1_ doo_v1_ dor_v1_", r"do[opr]_v1_[0-9a-f]{64}", _CLOUD, "gitleaks digitalocean-pat"),
    _token("HashiCorp Vault", "hvs. hvb. hvr.", r"hv[sbr]\.[\w\-]{24,}", "Opens a vault.", "gitleaks vault-service-token"),
    _token("Pulumi", "pul-", r"pul-[0-9a-f]{40}", _CLOUD, "gitleaks pulumi-api-token"),
    _token("Doppler", "dp.pt. dp.st.", r"dp\.[ps]t\.[A-Za-z0-9_\-.]{40,}", "Opens a vault.", "gitleaks doppler-api-token"),
    _token("GitHub", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,}", _CODE, "gitleaks github-pat"),
    _token("GitHub, fine-grained", "github_pat_", r"github_pat_\w{22,}", _CODE, "gitleaks github-fine-grained-pat"),
    _token("GitLab", "glpat- gldt- glrt- glcbt- glptt- glft- glsoat- gloas-", r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|oas)-[\w\-]{20,}", _CODE, "gitleaks gitlab-pat"),
    _token("npm", "npm_", r"npm_[A-Za-z0-9]{36}", _CODE, "gitleaks npm-access-token"),
    _token("PyPI", "pypi-AgE", r"pypi-AgE[\w\-]{50,}", _CODE, "gitleaks pypi-upload-token"),
    _token("RubyGems", "rubygems_", r"rubygems_[0-9a-f]{48}", _CODE, "gitleaks rubygems-api-token"),
    _token("Docker", "dckr_pat_ dckr_oat_", r"dckr_[op]at_[\w\-]{20,}", _CODE, "https://docs.docker.com/security/for-developers/access-tokens/"),
    _token("Atlassian", "ATATT3", r"ATATT3[\w\-=]{60,}", _CODE, "gitleaks atlassian-api-token"),
    _token("Slack", "xoxb- xoxp- xoxa- xoxo- xoxr- xoxs- xoxe- xoxe.xox", r"xox(?:[abeoprs]-|e\.xox[bp]-)[A-Za-z0-9\-]{15,}", _CHAT, "gitleaks slack-bot-token"),
    _token("Slack application", "xapp-", r"xapp-\d-[A-Za-z0-9\-]{15,}", _CHAT, "gitleaks slack-app-token"),
    _token("SendGrid", "SG.", r"SG\.[\w\-]{16,64}\.[\w\-]{16,}", _CHAT, "gitleaks sendgrid-api-token"),
    _token("Notion", "secret_ ntn_", r"(?:secret_[A-Za-z0-9]{43}|ntn_[A-Za-z0-9]{40,})" + _NO_MORE, _CHAT, "gitleaks notion-api-token"),
    _token("Linear", "lin_api_", r"lin_api_[A-Za-z0-9]{40}", _CHAT, "gitleaks linear-api-key"),
    _token("Mailgun", "key-", r"key-[0-9a-f]{32}" + _NO_MORE, _CHAT, "gitleaks mailgun-private-api-token"),
    _token("Stripe", "sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_ whsec_", r"(?:[rs]k_(?:live|test|prod)_[A-Za-z0-9]{12,}|whsec_[A-Za-z0-9+/=]{20,})", _PAY, "gitleaks stripe-access-token"),
    _token("Square", "sq0atp- sq0csp-", r"sq0(?:atp-[\w\-]{22}|csp-[\w\-]{43})", _PAY, "detect-secrets square_oauth.py"),
    _token("Shopify", "shpat_ shpss_ shpca_ shppa_", r"shp(?:at|ss|ca|pa)_[0-9a-fA-F]{32}", _PAY, "gitleaks shopify-access-token"),
    _token("New Relic", "NRAK- NRIQ- NRRA-", r"(?:NRAK-[A-Z0-9]{27}|NRIQ-[\w\-]{32}|NRRA-[0-9a-f]{42})", "Reads what is observed.", "gitleaks new-relic-user-api-key"),
    _token("Sentry", "sntrys_ sntryu_", r"sntry[su]_[A-Za-z0-9+/=_\-]{40,}", "Reads what is observed.", "gitleaks sentry-org-token"),
    _token("Grafana", "glsa_ glc_", r"gl(?:sa_[A-Za-z0-9]{32}_[0-9a-f]{8}|c_[A-Za-z0-9+/]{32,}=*)", "Reads what is observed.", "gitleaks grafana-service-account-token"),
    _token("Postman", "PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}", _CODE, "gitleaks postman-api-token"),
    _token("Figma", "figd_", r"figd_[\w\-]{36,}", _CHAT, "https://www.figma.com/developers/api#access-tokens"),
    _token("age", "AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}", "Decrypts files.", "gitleaks age-secret-key"),
    _token("JSON Web Token", "eyJ", r"eyJ[\w\-]{8,512}\.(?:eyJ|[\w\-]{0,600}\.)[\w\-]*(?:\.[\w\-]*){0,3}", "Logs in as somebody until it expires.", "gitleaks jwt; RFC 7519, RFC 7516"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """A form of secrets that is known by what stands around them; ``contents`` has the code.

    Attributes:
        name: What is masked.
        reason: The reason why it is on the list.
        source: Where the form is described.
    """

    name: str
    reason: str
    source: str


RULES: Sequence[Rule] = (
    Rule("`Bearer …`", "Whoever has the text has the access.", "RFC 6750, 2.1; gitleaks curl-auth-header"),
    Rule("`Basic …`, where it decodes to a name, a colon and a password", "It is the password.", "RFC 7617, 2; detect-secrets basic_auth.py"),
    Rule("the password in `scheme://user:password@host`", "Database and queue addresses carry it.", "RFC 3986, 3.2.1; detect-secrets basic_auth.py"),
    Rule("the path of a Slack, Discord or Teams webhook", "Whoever has the address may post.", "gitleaks slack-webhook-url; https://discord.com/developers/docs/resources/webhook"),
    Rule("the signature of a pre-signed address (`sig=`, `X-Amz-Signature=`, `X-Goog-Signature=`)", "The address is the access until it expires.", "https://learn.microsoft.com/azure/storage/common/storage-sas-overview; https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html"),
    Rule("private keys in PEM, whole or cut", "They are what they say.", "RFC 7468; gitleaks private-key; detect-secrets private_key.py"),
    Rule("`NAME=value`, `--name=value`, `--name value`, `?name=value`, where the name is that of a secret", "Environment files, command lines, addresses, code.", "detect-secrets keyword.py; gitleaks generic-api-key"),
    Rule('`name: value` and `"name": "value"`, the same', "YAML, JSON, headers as text.", "detect-secrets keyword.py; gitleaks generic-api-key"),
    Rule("`Authorization: …`, `Cookie: …`, `Set-Cookie: …` to the end of the line", "Headers as HTTP clients log them.", "RFC 9110, 11.6; RFC 6265, 4"),
    Rule("`-u name:password`", "curl's way to say it.", "gitleaks curl-auth-user"),
)  # fmt: skip
