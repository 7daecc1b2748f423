//! Images after they were published, at a real endpoint: what the commands show, what they change, and that what isn't
//! kiln's stays as it is.

mod copy;
mod images;
mod retire;
mod share;
mod sweep;

use serde_json::{Value, json};

use crate::support::{Aws, Base, Bench, Kiln, append_data, write_base};

const HOME: &str = "us-east-1";
const AWAY: &str = "eu-west-1";

/// An endpoint with one image, `web-1` of the recipe `web` in us-east-1.
struct Stage {
    bench: Bench,
    aws: Aws,
    image: String,
}

impl Stage {
    fn new() -> Self {
        let stage = Self::without_image();
        let image = stage.publish("web-1");
        stage.aws.reset();
        Self { image, ..stage }
    }

    /// With a disk, and nothing at the endpoint.
    fn without_image() -> Self {
        let bench = Bench::empty();
        write_base(&bench.path("base.raw"), Base::Mbr);
        append_data(&bench.path("base.raw"), 1 << 20);
        bench.recipe("[publish]\nbucket = \"images\"\ntags = { team = \"web & co\" }\n");
        bench.build(&json!({})).run().succeeded();
        Self { bench, aws: Aws::start(), image: String::new() }
    }

    fn publish(&self, name: &str) -> String {
        let line = self.kiln(["-q", "publish", "out/web", "--via", "ebs", "--image-name", name]).run().succeeded();
        line.trim_end().split_once(' ').unwrap().1.to_owned()
    }

    fn kiln<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Kiln {
        self.aws.with(self.bench.kiln(arguments))
    }

    /// One more image, so many days old, with kiln's tags and a snapshot of its own.
    fn another(&self, name: &str, days: u32) -> String {
        let mut parameters = vec![
            ("SourceRegion".to_owned(), HOME.to_owned()),
            ("SourceImageId".to_owned(), self.image.clone()),
            ("Name".to_owned(), name.to_owned()),
        ];
        for (index, kind) in ["image", "snapshot"].iter().enumerate() {
            let specification = format!("TagSpecification.{}", index + 1);
            parameters.push((format!("{specification}.ResourceType"), (*kind).to_owned()));
            for (number, (key, value)) in [("kiln:name", "web"), ("kiln:digest", name)].iter().enumerate() {
                parameters.push((format!("{specification}.Tag.{}.Key", number + 1), (*key).to_owned()));
                parameters.push((format!("{specification}.Tag.{}.Value", number + 1), (*value).to_owned()));
            }
        }
        let parameters: Vec<_> = parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let answer = self.aws.ec2(HOME, "CopyImage", &parameters);
        let image = element(&answer, "imageId");
        self.age(&image, days);
        image
    }

    /// An image that nobody made with kiln.
    fn foreign(&self, name: &str) -> String {
        let parameters = [("SourceRegion", HOME), ("SourceImageId", self.image.as_str()), ("Name", name)];
        element(&self.aws.ec2(HOME, "CopyImage", &parameters), "imageId")
    }

    fn age(&self, id: &str, days: u32) {
        self.aws.control("POST", "age", Some(&json!({ "id": id, "days": days })));
    }

    /// The images in a region, with all that kiln tells of them.
    #[track_caller]
    fn images(&self, region: &str) -> Vec<Value> {
        let ran = self.kiln(["--format", "json", "-q", "images", "--region", region]).run();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        ran.json().as_array().unwrap().clone()
    }

    /// The ids of the images and of the snapshots at the endpoint.
    fn ids(&self) -> [Vec<String>; 2] {
        let names = self.aws.control("GET", "resources", None)["names"].clone();
        ["images", "snapshots"].map(|kind| {
            let mut ids: Vec<String> = serde_json::from_value(names[kind].clone()).unwrap();
            ids.sort();
            ids
        })
    }

    /// The snapshot of an image in us-east-1.
    #[track_caller]
    fn snapshot(&self, image: &str) -> String {
        let images = self.images(HOME);
        let found = images.iter().find(|one| one["image_id"] == image).unwrap();
        found["snapshots"][0].as_str().unwrap().to_owned()
    }
}

/// The text of the first XML element of this name.
#[track_caller]
fn element(xml: &str, name: &str) -> String {
    let (_, rest) = xml.split_once(&format!("<{name}>")).unwrap_or_else(|| panic!("no {name} in {xml}"));
    rest.split_once('<').unwrap().0.to_owned()
}

/// With the endpoint's ids made the same for every run.
fn redacted(text: &str) -> String {
    let mut words = Vec::new();
    for word in text.split(' ') {
        let (line, rest) = word.split_once('\n').map_or((word, None), |(line, rest)| (line, Some(rest)));
        words.push([Some(line), rest].into_iter().flatten().map(without_id).collect::<Vec<_>>().join("\n"));
    }
    words.join(" ")
}

fn without_id(word: &str) -> String {
    for kind in ["ami-", "snap-", "import-snap-"] {
        if let Some(at) = word.find(kind) {
            let (before, rest) = word.split_at(at + kind.len());
            let digits = rest.bytes().take_while(u8::is_ascii_hexdigit).count();
            if digits >= 8 {
                return format!("{before}{}{}", "0".repeat(17), &rest[digits..]);
            }
        }
    }
    word.to_owned()
}
