"""Prompts that would overrule those of the operator: scored by what such texts say. Heuristics: they raise the price of an attack,
they do not prevent it."""

import binascii
import re
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from fairlead.core.errors import ConfigError
from fairlead.gateway.filters.folding import Fold

THRESHOLD = 1.0
MAX_BLOBS, MAX_BLOB_CHARS = 16, 8192
_BLOB = re.compile(r"[A-Za-z0-9+/]{24,8192}={0,2}")
_MARKS = re.compile("[\u0300-\u036f]+")

_DROP = r"(?:ignor(?:e|ing)|disregard(?:ing)?|forget(?:ting)?|overrid(?:e|ing)|discard(?:ing)?|neglect)"
_ORDERS = (
    r"(?:instructions?|prompts?|rules?|directions?|guidelines?|directives?|commands?|orders?|constraints?|programming|messages? from the)"
)
_BEFORE = r"(?:previous|prior|above|earlier|preceding|foregoing|system|initial|original|former|last)"
_TELL = r"(?:reveal|show|print|repeat|output|display|tell me|give me|leak|dump|expose|write out|share|disclose|summari[sz]e|translate|encode|what(?:'s| is| are| was| were))"
_HIDDEN = r"(?:system|initial|original|hidden|secret|internal|developer|confidential)"

PATTERNS: tuple[tuple[float, str], ...] = (
    # To be rid of what was said before
    (1.0, rf"\b{_DROP}\b.{{0,30}}\b{_BEFORE}\b.{{0,20}}\b{_ORDERS}\b"),
    (1.0, rf"\b{_DROP}\b.{{0,30}}\b(?:everything|all|anything|what)\b.{{0,20}}\b(?:above|before this|(?:told|instructed|said) (?:to )?(?:you|before))\b"),
    (0.6, rf"\b(?:{_DROP}|bypass|break|violate|disable|turn off)\b.{{0,20}}\byour\b.{{0,30}}\b(?:{_ORDERS}|restrictions?|filters?|safety|training|limitations?|polic(?:y|ies)|guardrails?|safeguards?)\b"),
    (0.6, r"\b(?:new|updated|real|actual) (?:system )?(?:instructions?|prompt|task|orders?|rules)\s{0,3}(?::|are\b|follow)"),
    (0.5, r"\byour (?:real|true|new|only|actual) (?:task|goal|purpose|job|role|instructions?) (?:is|are)\b"),
    # To be another
    (0.5, r"\b(?:you are now|you will now (?:act|be|become)|you'?re now|from now on,? you|pretend (?:to be|you are|you're|that you)|roleplay as|act as if you|simulate (?:being|an ai))\b"),
    (0.6, r"\b(?:unrestricted|unfiltered|uncensored|jailbroken|amoral|evil) (?:ai|assistant|model|chatbot|bot|version|llm|persona)\b"),
    (0.6, r"\b(?:no|without(?: any)?|free (?:of|from)(?: all| any)?|not bound by(?: any)?|ignores? all) (?:ethical |moral |content |safety )?(?:restrictions|filters|limits|limitations|guidelines|rules|censorship|guardrails)\b"),
    (1.0, r"\bdo anything now\b|\b(?:developer|god|dan|jailbreak|sudo|debug|admin) mode (?:is )?(?:now )?(?:enabled\b|activated\b|active\b|output\b|unlocked\b|on(?:[.!]|$))|\b(?:enable|enter|activate|switch to) (?:god|dan|jailbreak|sudo|unrestricted) mode\b"),
    (0.6, r"\b(?:enable|enter|activate|switch to) developer mode\b"),
    (0.5, r"\b(?:stay in character|never (?:refuse|say no|break character)|(?:cannot|can't|can not|must not|may not) refuse|always comply|you must (?:obey|comply)|answer any question)\b"),
    # To tell what is hidden
    (1.0, rf"\b{_TELL}\b.{{0,30}}\byour (?:{_HIDDEN} |full |entire |complete |exact ){{1,3}}(?:prompt|instructions?|messages?|rules|configuration|directives|guidelines)\b"),
    (1.0, rf"\b{_TELL}\b.{{0,20}}\b(?:the|this|any) (?:{_HIDDEN} ){{1,2}}(?:prompt|instructions) (?:verbatim|word for word|above|you were|that|given)\b"),
    (1.0, r"\b(?:repeat|print|output|copy|recite|return)\b.{0,20}\b(?:everything|all|words|text|content|lines|the conversation)\b.{0,12}\babove\b"),
    (1.0, r"\b(?:instructions?|prompt|rules|message) (?:that )?(?:you were|you'?ve been|you have been) (?:given|told|provided)\b.{0,60}\b(?:verbatim|word for word|start|beginning|exactly)\b"),
    # To speak as the chat's own machinery
    (1.0, r"<\|(?:im_start|im_end|system|user|assistant|endoftext|start_header_id|end_header_id|eot_id|begin_of_text|channel|message)\|>|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>"),
    (0.6, r"(?:^|\n)\s{0,8}(?:#{1,4}\s?|\[|<|\*{2})(?:system|assistant|developer|admin)(?: (?:message|prompt|note|override|instructions?))?(?:\]|>|:|\*{2})"),
    (0.5, r"\n\s{0,8}(?:system|assistant|developer)\s?:\s"),
    (0.5, r"\b(?:end|beginning|start) of (?:the )?(?:system|user|hidden|untrusted) (?:prompt|input|instructions?|message|data)\b"),
    # To use the model against its user
    (0.6, r"\b(?:note|message|instructions?|attention|important)\b.{0,12}\b(?:ai|assistant|llm|language model|chatbot)s?\b.{0,3}:"),
    (0.6, r"\b(?:do not|don't|without|never)\b.{0,12}\b(?:tell|telling|inform|informing|mention|mentioning|alert|alerting|notify|notifying)\b.{0,12}\bthe user\b"),
    (0.6, r"\b(?:send|post|forward|exfiltrate|upload|append|leak)\b.{0,60}\b(?:conversation|chat history|api keys?|passwords?|credentials|secrets|system prompt|user'?s data)\b.{0,60}(?:https?://|@|\bto (?:this|the following)\b)"),
    # In other languages
    (1.0, r"\b(?:ignorieren?|vergiss|vergessen sie|missachte)\b.{0,40}(?:vorherig|vorig|bisherig|obig|fruher|alle)\pL*.{0,20}(?:anweisung|instruktion|befehl|regel|vorgabe)"),
    (1.0, r"\b(?:ignore[zr]?|oublie[zr]?)\b.{0,30}(?:instructions?|consignes?|directives?|regles?)\b.{0,20}(?:precedent|ci-dessus|anterieur|initial|systeme)"),
    (1.0, r"\b(?:ignora|ignore|ignorad|olvida|olvide|omite|descarta)\b.{0,40}(?:instrucciones|ordenes|reglas|indicaciones)\b.{0,20}(?:anterior|previa|dadas)|\b(?:ignora|ignore|olvida|omite)\b.{0,20}(?:anterior|previa)\pL*.{0,20}(?:instrucciones|ordenes|reglas)"),
    (1.0, r"\b(?:ignora|ignorate|dimentica)\b.{0,40}(?:istruzioni|regole|indicazioni)\b.{0,20}(?:precedent|sopra|iniziali)|\b(?:ignora|dimentica)\b.{0,20}precedenti.{0,12}istruzioni"),
    (1.0, r"\b(?:ignore|ignora|esqueca|desconsidere)\b.{0,40}(?:instrucoes|regras|ordens|orientacoes)\b.{0,20}(?:anteriores|previas|acima)"),
    (1.0, r"(?:игнорируй|проигнорируй|забудь|не обращай внимания)\pL*.{0,40}(?:предыдущ|прежн|прошл|все|выше)\pL*.{0,20}(?:инструкц|указани|правил|команд)"),
    (1.0, r"(?:忽略|无视|無視|忘记|忘記|忽視).{0,10}(?:之前|以上|上面|先前|前面|所有|此前).{0,8}(?:指令|指示|提示|说明|說明|规则|規則|命令|内容)"),
    (1.0, r"(?:以前|前|上記|これまで|すべて|全て)の.{0,8}(?:指示|命令|ルール|プロンプト).{0,6}(?:無視|忘れ)"),
    (1.0, r"(?:이전|위의|앞의|모든).{0,30}(?:지시|명령|지침|규칙).{0,30}(?:무시|잊)"),
)  # fmt: skip
"""(weight, RE2 over the folded text). A text counts as an injection where the weights of those that it matches add up to THRESHOLD."""


def injection() -> Callable[[str], float]:
    """The score of a text. Raises ConfigError."""
    try:
        import re2
    except ImportError:
        raise ConfigError("gateway filters: `injection` needs RE2: pip install 'fairlead[filters]'") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 64 << 20
    fold = Fold()

    def plain(text: str) -> str:
        folded = fold.quickly(text)
        return folded if folded.isascii() else _MARKS.sub("", folded)

    patterns: Any = re2.Set.SearchSet(options)
    for _, pattern in PATTERNS:
        patterns.Add("(?s)" + "".join(each if each.isascii() else plain(each) for each in pattern))
    patterns.Compile()

    blob = re2.compile(b"[A-Za-z0-9+/]{24}")

    def points(text: str) -> float:
        return sum(float(PATTERNS[index][0]) for index in patterns.Match(plain(text).encode("utf-8", "replace")) or ())

    def score(text: str) -> float:
        hidden = max(map(points, _encoded_texts(text)), default=0.0) if blob.search(text.encode("utf-8", "replace")) else 0.0
        # nobody hides an innocent text
        return points(text) + (THRESHOLD if hidden >= THRESHOLD / 2 else 0.0)

    return score


def _encoded_texts(text: str) -> list[str]:
    """What base64 within the text says."""
    found = []
    for match, _ in zip(_BLOB.finditer(text), range(MAX_BLOBS), strict=False):
        blob = match[0].rstrip("=")
        try:
            inner = b64decode(blob[: len(blob) // 4 * 4 or None]).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
        if inner.isprintable() or inner.replace("\n", " ").isprintable():
            found.append(inner)
    return found
