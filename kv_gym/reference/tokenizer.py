"""The closed vocabulary of the reference language, grouped by parts of speech, and its word-level tokenizer.

Names, numbers and relation words occur in facts, in distractors and in filler alike, so that no word by itself tells
which sentences a question will ask about.
"""

from __future__ import annotations

from functools import cache

SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>")

NAMES = """
Aaron Abel Ada Adam Agnes Alan Albert Alex Alice Alma Amber Amos Amy Andrew Angela Anna Anton April Arthur
Asher Aurora Basil Beatrix Bella Ben Bernard Beth Bianca Bob Boris Brenda Brian Bruno Carl Carmen Carol Cecil
Celia Charles Chloe Clara Claude Colin Conrad Cora Cyril Daisy Damian Daniel Daphne David Dean Deborah Denis
Diana Dora Doris Dorothy Douglas Edgar Edith Edmund Edna Edward Elena Eli Elias Eliza Ella Ellen Elmer Elsa
Emil Emily Emma Enid Eric Ernest Esther Ethan Eugene Eva Fanny Felix Fergus Fiona Flora Florence Frances Frank
Freda Frederick Gabriel Gary George Gerald Gilbert Gina Giles Gladys Gloria Gordon Grace Greta Gustav Gwen
Hannah Harold Harriet Harry Hazel Hector Heidi Helen Henry Herbert Hilda Homer Horace Howard Hubert Hugh Hugo
Ian Ida Ingrid Irene Iris Irma Isaac Ivan Ivy Jack Jacob James Jane Janet Jasper Jean Jennifer Jerome Jesse
Joan Joel John Jonas Joseph Joyce Judith Julia Julius Karen Karl Kate Keith Kenneth Kevin Lara Laura Lena
Leo Leonard Leslie Lewis Lily Linda Lionel Lois Louis Lucas Lucy Luke Luther Lydia Mabel Magnus Marcus
Margaret Maria Mark Martha Martin Mary Matilda Matthew Maud Max Mildred Miles Milo Mona Morris Muriel Nancy
Naomi Nathan Neil Nell Nicholas Nina Noah Nora Norman Olaf Olga Olive Oliver Oscar Otto Owen Pamela Patrick
Paul Paula Pearl Percy Peter Philip Phoebe Quentin Rachel Ralph Raymond Rebecca Rex Rita Robert Robin Roger
""".split()

NUMBERS = [str(number) for number in range(100)]

FACT_RELATIONS = (
    "code room phone locker badge gate ticket table train shelf channel account house page flight key".split()
)
DISTRACTOR_RELATIONS = (
    "size weight age score price height speed depth rank width length level distance area count power".split()
)

MARKS = ". question all and ? common user assistant".split()

THINGS = """
anchor apron arrow axe bag ball banner barrel basin basket bell belt bench blanket boat book boot bottle bowl
box branch bread brick bridge broom brush bucket bundle button cabinet cable cake camera candle canoe cap card
carpet cart case chain chair chalk chart chest clock cloth coat coin comb compass copper cord cork crate crown
cup curtain desk diary dish doll door drawer dress drum engine envelope fan feather fence fiddle flag flask
flute fork frame fruit furnace garland glass glove gown guitar hammer handle harp hat helmet hinge hook horn
jacket jar jewel jug kettle kite knife ladder lamp lantern leaf ledger letter lid lock log loom magnet map
marble mask mat medal mill mirror mug nail necklace needle net note novel oar organ oven paddle painting pan
parcel pen pencil piano picture pillow pin pipe pitcher plank plate plough pocket poem pole poster pot pump
purse quilt rack radio raft rail ribbon rifle ring robe rope rug sack saddle sail saw scale scarf scissors
screw seed shield shirt shoe shovel sign silk skirt sled slipper soap sock spade spoon stamp statue stick stone
stool stove string suit sword tablet tent thread tile timber tool torch towel toy tray trumpet trunk tunic
umbrella vase veil vest violin wagon wallet watch wheel whistle window wire wool wreath
""".split()

PLACES = """
abbey airport alley attic avenue bakery balcony bank barn bay beach cabin cafe camp canal castle cave cellar
chapel church circus city cliff clinic coast college corner cottage court dairy desert dock factory farm ferry
field forest fort fountain garage garden glade gallery hall harbor hill hospital hotel inn island jungle
kitchen lake lane library lighthouse market meadow mine monastery museum office orchard palace park pasture
path pier plain playground pond port prairie quarry ranch reef restaurant river road school shed shop shore
stable stadium station street studio swamp temple theater tower town tunnel valley village vineyard yard zoo
""".split()

ADJECTIVES = """
amber ancient blue bold brave bright broad broken brown calm careful cheap clean clear clever cold cool costly
crimson curious dark deep dry dull dusty eager early empty faded fair famous fancy fast fine firm flat fresh
gentle giant golden grand gray great green happy hard heavy hidden high hollow honest huge humble icy idle
kind large late lazy light little lonely long loose lost loud lovely low lucky mild modern muddy narrow neat new
noble noisy odd old open orange painted pale patient plain pleasant polite poor pretty proud pure purple quick
quiet rare red rich ripe rough round royal rusty sad safe sharp short shy silent silver simple sleepy slow small
smart smooth soft solid sour spare steep stiff straight strange strong sturdy sweet swift tall tame thick thin
tidy tiny tired tough useful vast violet warm weak wet white wide wild wise wooden yellow young
""".split()

ACTIONS = """
admired bought borrowed brought built burned carried caught cleaned collected counted covered described
discovered drew dropped examined fixed forgot found gave guarded handed held ignored kept left lent lifted
liked loaded missed moved noticed offered opened ordered packed painted passed placed polished praised pulled
pushed raised received repaired returned saved sent shared showed sold stole stored studied threw touched
traded trusted turned used wanted washed wrapped
""".split()

TRAVELS = "crossed entered explored left passed reached remembered toured visited watched".split()

ADVERBS = """
again alone already always away badly briefly calmly carefully daily easily gladly hardly here later loudly
mostly nearly never now often once outside quickly quietly rarely sadly safely slowly soon suddenly there today
together tomorrow tonight twice upstairs usually well yesterday
""".split()

FUNCTION_WORDS = """
a about after an as at because before behind beside but by during for from had he her his in into it its near
of on or our out over own she so some that the their them then they this through to under until was we were when
where while who with without you your not no yes please thanks hello every one other
""".split()


def vocabulary() -> list[str]:
    """Every word once, in a fixed order: the order is the token id less the number of special tokens."""
    groups = (
        MARKS, NUMBERS, NAMES, FACT_RELATIONS, DISTRACTOR_RELATIONS, THINGS, PLACES, ADJECTIVES, ACTIONS,
        TRAVELS, ADVERBS, FUNCTION_WORDS,
    )  # fmt: skip
    return list(dict.fromkeys(word for group in groups for word in group))


@cache
def word_ids() -> dict[str, int]:
    """The id of every special token and word."""
    return {word: i for i, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}


def encode(words) -> list[int]:
    """Token ids of words of the closed vocabulary (no beginning token)."""
    ids = word_ids()
    return [ids[word] for word in words]


def build_tokenizer():
    """A `transformers` tokenizer: words split at white space, a beginning token before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(word_ids(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", word_ids()["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>", model_max_length=2048
    )
