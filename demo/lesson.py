"""A lesson to try the Teach tab with: messages to a small shop, forty-two of them."""

from __future__ import annotations

NAME = "shop mail"
EXAMPLES = {
    "question": [
        "Do you ship to Norway?",
        "Which size fits a child of six?",
        "Is the blue one back in stock next week?",
        "Can I pay by bank transfer?",
        "How long does delivery usually take?",
        "Does the lamp come with a bulb?",
        "What are your opening hours on Saturday?",
        "Could you tell me whether this fabric can be washed?",
        "Where do I enter the voucher code?",
        "Is it possible to change the address after ordering?",
        "Do these boots run small or large?",
        "When will the new catalogue be out?",
        "May I send it back if my sister does not like it?",
        "Who do I ask about a bulk order?",
    ],
    "complaint": [
        "The parcel arrived crushed and half of it is missing.",
        "I have waited three weeks and nobody answers my letters.",
        "You charged my card twice for one order.",
        "The handle came off on the first day.",
        "This is the second wrong size in a row.",
        "The colour is nothing like the picture.",
        "Your hotline kept me waiting for an hour and hung up.",
        "The glass was cracked when I opened the box.",
        "I returned it a month ago and still have no refund.",
        "It stopped working after two uses.",
        "The instructions are wrong and the screws do not fit.",
        "Somebody else's order was in my package.",
        "The jacket smells of smoke, and I want my money back.",
        "Late again, and again without a word of apology.",
    ],
    "praise": [
        "The cups are even lovelier than in the photos.",
        "Thank you for packing everything with such care.",
        "Your colleague on the phone was wonderful.",
        "It came a day early, and my mother is delighted.",
        "The best blanket I have ever owned.",
        "Great service, I will gladly order again.",
        "The handwritten card made my day.",
        "Sturdy, simple and beautiful, just as I had hoped.",
        "My compliments to whoever designed this teapot.",
        "Replacing the broken part went quickly and kindly.",
        "I have told all my friends about your shop.",
        "Perfect fit, and so soft.",
        "Such a friendly answer to a silly mistake of mine.",
        "Five years of daily use, and it still looks like new.",
    ],
}
TRY = ["Why has my order not arrived yet? This is a disgrace.", "Have you got this in green?",
       "What a beautiful bowl, we use it every day."]  # fmt: skip
