"""240 English sentences on eight topics, so that embeddings have neighbours to agree on."""

from __future__ import annotations

import itertools

_TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cooking": (
        (
            "The baker",
            "My grandmother",
            "A street vendor",
            "The head chef",
            "Our neighbour",
            "The apprentice",
        ),
        (
            "kneads the dough slowly and lets it rest overnight in a cool place.",
            "adds a pinch of salt.",
            "says that the secret of a good soup is patience, and bones roasted until they are brown.",
            "burnt the onions again, so the whole kitchen smelled of smoke until the evening.",
            "prefers fresh basil to dried oregano in tomato sauce.",
        ),
    ),
    "astronomy": (
        (
            "The telescope",
            "A young astronomer",
            "The survey team",
            "The observatory",
            "A space probe",
            "The mission",
        ),
        (
            "discovered a faint planet that circles a red dwarf every eleven days.",
            "photographed the rings of Saturn.",
            "measured how quickly distant galaxies recede, and found a value higher than theory predicts.",
            "lost contact for six hours during the solar storm.",
            "is waiting for a cloudless night to observe the comet.",
        ),
    ),
    "finance": (
        (
            "The central bank",
            "A small investor",
            "The pension fund",
            "The auditor",
            "The start-up",
            "The ministry",
        ),
        (
            "raised its forecast for inflation by half a percentage point this quarter.",
            "sold all of its bonds.",
            "warned that rising interest rates would make mortgages harder to afford for young families.",
            "found an error in the annual accounts that had gone unnoticed for three years.",
            "expects profits to recover once shipping costs come down.",
        ),
    ),
    "sport": (
        (
            "The goalkeeper",
            "Our team",
            "The veteran sprinter",
            "The coach",
            "The visiting side",
            "A substitute",
        ),
        (
            "won the match in the last minute of extra time in front of a silent crowd.",
            "trains twice a day.",
            "missed the final because of a knee injury that has never properly healed.",
            "praised the referee for keeping calm when tempers rose on the pitch.",
            "broke the national record by two hundredths of a second.",
        ),
    ),
    "medicine": (
        (
            "The surgeon",
            "A retired nurse",
            "The clinic",
            "The research group",
            "The patient",
            "The pharmacist",
        ),
        (
            "explained that the new vaccine needs two doses, four weeks apart.",
            "reported a mild fever.",
            "compared the side effects of both drugs in a trial with nine hundred volunteers.",
            "recommends walking half an hour a day to lower blood pressure.",
            "could not read the handwriting on the prescription.",
        ),
    ),
    "software": (
        (
            "The compiler",
            "A new engineer",
            "The database",
            "The build server",
            "The maintainer",
            "The web service",
        ),
        (
            "rejects the program because a variable is used before it is defined.",
            "crashed at midnight.",
            "spent the whole week looking for a memory leak that appeared only under heavy load.",
            "caches the results of expensive queries so that the next request is answered at once.",
            "was upgraded to the latest version without anybody noticing.",
        ),
    ),
    "weather": (
        ("The storm", "A cold front", "The heat wave", "The forecaster", "Thick fog", "The monsoon"),
        (
            "delayed every flight from the northern airport until late in the afternoon.",
            "arrived earlier than usual.",
            "is expected to bring heavy rain to the coast and snow to the mountains by the weekend.",
            "left thousands of homes without electricity for two days.",
            "surprised the farmers just before the harvest.",
        ),
    ),
    "music": (
        ("The violinist", "A street band", "The choir", "The composer", "The piano teacher", "The orchestra"),
        (
            "rehearsed the slow movement until every phrase could be heard clearly.",
            "played without a microphone.",
            "wrote a cycle of songs about the sea after moving to a village on the coast.",
            "tuned the instruments twice because the hall was so dry and warm.",
            "received a standing ovation at the end of the concert.",
        ),
    ),
}

SENTENCES: tuple[str, ...] = tuple(
    f"{subject} {predicate}"
    for subjects, predicates in _TOPICS.values()
    for subject, predicate in itertools.product(subjects, predicates)
)
