// Marks a downloaded PNG as generated, in the same way as catinfer, see infer/provenance.py: an iTXt chunk with an XMP
// packet that holds IPTC's DigitalSourceType, the generator and what the image was made from.

const NAMESPACES = {
  Iptc4xmpExt: "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
  xmp: "http://ns.adobe.com/xap/1.0/",
  catgan: "urn:uuid:b99669f5-c277-57bf-acd2-2eec348aa10d#",
};
const IHDR_END = 33; // bytes of the signature and the first chunk

/** The packet of a blend of the seeds left and right of a class, if the generator has classes, with mix percent of right,
 *  moved along directions: { d1: "2.5" }. */
export function packetOf({ software, sha256, left, right, mix, psi, moves, class: name }) {
  const decimal = (value) => (Number.isInteger(value) ? value.toFixed(1) : String(value));
  const directions = Object.entries(moves).map(([name, amount]) => `${name.slice(1)}=${decimal(Number(amount))}`);
  const properties = {
    "Iptc4xmpExt:DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
    "xmp:CreatorTool": software,
    "catgan:Kind": "blend",
    "catgan:GeneratorSHA256": sha256,
    "catgan:Seeds": `${left}${right === left + 1 ? "-" : ","}${right}`,
    "catgan:Psi": decimal(psi),
    "catgan:Mix": String(mix),
    ...(directions.length && { "catgan:Directions": directions.join(",") }),
    ...(name !== undefined && { "catgan:Classes": JSON.stringify([name]) }),
  };
  const written = (entries) => entries.map(([name, value]) => ` ${name}="${escaped(value)}"`).join("");
  return (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">' +
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""' +
    written(Object.entries(NAMESPACES).map(([prefix, uri]) => [`xmlns:${prefix}`, uri])) +
    `${written(Object.entries(properties))}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>`
  );
}

/** The PNG file of a blob, with a packet. */
export async function withPacket(png, packet) {
  const file = new Uint8Array(await png.arrayBuffer());
  // Keyword, not compressed, no language, no translated keyword.
  const content = new TextEncoder().encode(`iTXtXML:com.adobe.xmp\0\0\0\0\0${packet}`);
  const number = (value) => Uint8Array.of(value >>> 24, value >>> 16, value >>> 8, value);
  const chunk = [number(content.length - 4), content, number(crc32(content))];
  return new Blob([file.subarray(0, IHDR_END), ...chunk, file.subarray(IHDR_END)], { type: "image/png" });
}

function escaped(text) {
  const names = { "&": "amp", "<": "lt", ">": "gt", '"': "quot" };
  return text.replace(/[&<>"]/g, (character) => `&${names[character]};`);
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}
